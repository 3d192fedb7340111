// The bare hand-over of frames, for benchmarks/infrastructure.py to compare with: processes that
// write a frame into shared memory and sleep, and one reader that gathers the frames of those that
// wait and wakes them. No unrolls, no checks, no network, no learner.
//
//   handover ACTORS MINIMUM_BATCH FRAME_BYTES SECONDS
//
// prints frames per second.

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

namespace {

enum : uint32_t { kAnswered, kRequested, kSleeping };

struct alignas(128) Slot {
  std::atomic<uint32_t> state;
};

struct alignas(128) Shared {
  std::atomic<int32_t> requests;  // That are not answered yet.
  std::atomic<uint32_t> reader_sleeps;
};

long Futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  // A lost wake-up would only cost a tenth of a second.
  timespec timeout = {0, 100000000};
  return syscall(SYS_futex, word, operation, value, operation == FUTEX_WAIT ? &timeout : nullptr,
                 nullptr, 0);
}

[[noreturn]] void Act(Shared* shared, Slot* slot, uint8_t* row, size_t bytes, int32_t minimum) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::vector<uint8_t> frame(bytes, 1);
  while (true) {
    std::memcpy(row, frame.data(), bytes);
    slot->state.store(kRequested);
    if (shared->requests.fetch_add(1) + 1 >= minimum && shared->reader_sleeps.exchange(0) != 0) {
      Futex(&shared->reader_sleeps, FUTEX_WAKE, 1);
    }
    uint32_t state = kRequested;
    slot->state.compare_exchange_strong(state, kSleeping);
    while (slot->state.load() != kAnswered) Futex(&slot->state, FUTEX_WAIT, kSleeping);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const uint32_t actors = std::atoi(argv[1]);
  const int32_t minimum = std::atoi(argv[2]);
  const size_t bytes = std::atol(argv[3]);
  const double seconds = std::atof(argv[4]);
  const size_t size = sizeof(Shared) + actors * (sizeof(Slot) + bytes);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  auto* shared = new (memory) Shared();
  auto* slots = reinterpret_cast<Slot*>(shared + 1);
  auto* rows = reinterpret_cast<uint8_t*>(slots + actors);
  for (uint32_t i = 0; i < actors; ++i) new (slots + i) Slot();
  std::vector<pid_t> children;
  for (uint32_t i = 0; i < actors; ++i) {
    const pid_t child = fork();
    if (child == 0) Act(shared, slots + i, rows + i * bytes, bytes, minimum);
    if (child < 0) return 1;  // The others end with this process.
    children.push_back(child);
  }
  std::vector<uint8_t> batch(actors * bytes);
  std::vector<uint32_t> waiting;
  uint64_t frames = 0;
  const auto started = std::chrono::steady_clock::now();
  std::chrono::duration<double> elapsed{};
  while (elapsed.count() < seconds) {
    while (shared->requests.load() < minimum) {
      shared->reader_sleeps.store(1);
      // Checked after the flag: an actor that comes later sees it and wakes this process.
      if (shared->requests.load() >= minimum) break;
      Futex(&shared->reader_sleeps, FUTEX_WAIT, 1);
    }
    waiting.clear();
    for (uint32_t i = 0; i < actors; ++i) {
      if (slots[i].state.load() == kAnswered) continue;
      std::memcpy(&batch[waiting.size() * bytes], rows + i * bytes, bytes);
      waiting.push_back(i);
    }
    // An actor may be gathered just before it has counted itself: then this is negative for a moment.
    shared->requests.fetch_sub(waiting.size());
    for (uint32_t i : waiting) {
      if (slots[i].state.exchange(kAnswered) == kSleeping) Futex(&slots[i].state, FUTEX_WAKE, 1);
    }
    frames += waiting.size();
    elapsed = std::chrono::steady_clock::now() - started;
  }
  for (pid_t child : children) kill(child, SIGKILL);
  for (pid_t child : children) waitpid(child, nullptr, 0);
  std::printf("%.0f\n", frames / elapsed.count());
}
