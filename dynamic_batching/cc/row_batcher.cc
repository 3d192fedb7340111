// The batcher of actors whose policy is on another machine: a plain C library for `row_batcher.py`.
// It gathers the rows of waiting actors in the form in which they travel, and hands the actions that
// come back to the actors. It keeps no unrolls: the segment has one row for each actor.

#include <algorithm>
#include <mutex>
#include <vector>

#include "segment_client.h"
#include "wire_row.h"

using namespace dynamic_batching;  // NOLINT: this file defines the library's interface.

namespace {

// Bounds each wait, because a process that is killed in the middle of its request may never send
// its wake-up.
constexpr uint64_t kLongestWaitNanoseconds = 200000000;
// Offset from the present value of the doorbell that no request reaches.
constexpr uint32_t kNever = 1u << 30;

struct Actor {
  bool is_fresh = true;     // No row was collected since its process started.
  bool is_sent = false;     // Its row was collected and is not answered.
  bool is_late = false;     // Others were collected without waiting longer for its row.
  int64_t num_answered = 0;  // Rows, since its process started.
};

struct RowBatcher {
  SegmentHeader* header;
  uint64_t row_bytes;
  // Guards the rest. Held while rows are copied, so that no process that replaces another writes
  // into a row that is being copied.
  std::mutex mutex;
  std::vector<Actor> actors;
};

bool IsRequested(const ActorBlock* block) {
  const uint32_t state = block->state.load(std::memory_order_acquire);
  return state == kRequested || state == kSleeping;
}

void CopyRow(const RowBatcher& batcher, uint32_t actor, uint8_t* wire) {
  SegmentHeader* header = batcher.header;
  const ActorBlock* block = GetActorBlock(header, actor);
  WireRowHeader sent = {};
  sent.actor = actor;
  memcpy(&sent.reward, GetRow(header, actor, kReward, 0), sizeof(sent.reward));
  memcpy(&sent.episode_return, GetRow(header, actor, kEpisodeReturn, 0),
         sizeof(sent.episode_return));
  memcpy(&sent.episode_step, GetRow(header, actor, kEpisodeStep, 0), sizeof(sent.episode_step));
  memcpy(&sent.episode_frames, GetRow(header, actor, kEpisodeFrames, 0),
         sizeof(sent.episode_frames));
  memcpy(&sent.end, GetRow(header, actor, kEnd, 0), sizeof(sent.end));
  sent.non_finite = block->non_finite;
  sent.non_finite_value = block->non_finite == 0 ? 0 : block->non_finite_value;
  sent.is_first = batcher.actors[actor].is_fresh;
  memcpy(wire, &sent, sizeof(sent));
  wire += sizeof(sent);
  for (uint32_t field = kFirstObservation; field < header->num_fields; ++field) {
    memcpy(wire, GetRow(header, actor, field, 0), header->fields[field].row_bytes);
    wire += header->fields[field].row_bytes;
  }
}

// Copies the rows of all waiting actors if there are at least `minimum`, proportionally fewer while
// some have not started, have finished or are late. Returns how many; otherwise 0, and in
// `num_missing` for how many requests to wait.
int32_t Collect(RowBatcher* batcher, uint32_t minimum, bool timed_out, uint8_t* rows,
                uint32_t* num_missing) {
  std::lock_guard<std::mutex> lock(batcher->mutex);
  std::vector<uint32_t> waiting;
  uint64_t num_active = 0;
  for (uint32_t i = 0; i < batcher->actors.size(); ++i) {
    const ActorBlock* block = GetActorBlock(batcher->header, i);
    Actor& actor = batcher->actors[i];
    if (IsRequested(block) && !actor.is_sent) {
      waiting.push_back(i);
      actor.is_late = false;
    }
    num_active += block->state.load() != kIdle && block->finished.load() == 0 && !actor.is_late;
  }
  const uint64_t needed = std::max<uint64_t>(1, minimum * num_active / batcher->actors.size());
  *num_missing = timed_out ? 1 : needed - std::min<uint64_t>(needed, waiting.size());
  if (waiting.size() < needed && (waiting.empty() || !timed_out)) return 0;
  for (uint32_t i = 0; timed_out && i < batcher->actors.size(); ++i) {
    // One time-out for each slow step is enough.
    const ActorBlock* block = GetActorBlock(batcher->header, i);
    if (block->state.load() == kActing) batcher->actors[i].is_late = true;
  }
  for (uint32_t actor : waiting) {
    CopyRow(*batcher, actor, rows);
    rows += batcher->row_bytes;
    batcher->actors[actor].is_sent = true;
    batcher->actors[actor].is_fresh = false;
  }
  return waiting.size();
}

}  // namespace

// Formats the memory behind `fd`, whose contents must be zeros. `row_bytes` has the bytes of the
// fixed fields of a row and then of its observations. Returns null if there is no memory.
EXPORT void* row_batcher_create(int fd, uint32_t num_actors, uint32_t num_fields,
                                const uint64_t* row_bytes, uint64_t action_bytes) {
  SegmentHeader header = {};
  if (num_actors == 0 || num_fields > kMaxFields || num_fields <= kFirstObservation) return nullptr;
  header.num_actors = num_actors;
  header.num_unrolls = num_actors;
  header.rows = 1;
  header.num_fields = num_fields;
  header.action_bytes = action_bytes;
  for (uint32_t i = 0; i < num_fields; ++i) header.fields[i].row_bytes = row_bytes[i];
  ComputeLayout(&header);
  if (ftruncate(fd, header.segment_bytes) != 0) return nullptr;
  void* segment =
      mmap(nullptr, header.segment_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, /*offset=*/0);
  if (segment == MAP_FAILED) return nullptr;
  auto* shared_header = static_cast<SegmentHeader*>(segment);
  memcpy(static_cast<void*>(shared_header), &header, offsetof(SegmentHeader, doorbell));
  shared_header->wake_at.store(kNever);
  for (uint32_t i = 0; i < num_actors; ++i) GetActorBlock(segment, i)->unroll = i;
  // Written last: a client that finds the magic number finds everything else in place.
  shared_header->magic = kSegmentMagic;
  return new RowBatcher{shared_header, WireRowBytes(header), {}, std::vector<Actor>(num_actors)};
}

EXPORT void row_batcher_delete(void* handle) {
  auto* batcher = static_cast<RowBatcher*>(handle);
  munmap(batcher->header, batcher->header->segment_bytes);
  delete batcher;
}

EXPORT uint64_t row_batcher_row_bytes(void* handle) {
  return static_cast<RowBatcher*>(handle)->row_bytes;
}

// Waits for the rows of at least `minimum` actors (see Collect), or for one row and the time-out
// after it, and writes them to `rows`, which has room for one of each actor. Returns how many rows,
// or kClosed. One thread at a time.
EXPORT int32_t row_batcher_collect(void* handle, uint32_t minimum, uint64_t timeout_nanoseconds,
                                   uint8_t* rows) {
  auto* batcher = static_cast<RowBatcher*>(handle);
  SegmentHeader* header = batcher->header;
  const uint64_t since = NowNanoseconds();
  while (true) {
    // Any event after this read makes the wait return at once, so all conditions must be checked
    // after it.
    const uint32_t requests = header->doorbell.load();
    if (header->closed.load()) return kClosed;
    const uint64_t waited = NowNanoseconds() - since;
    const bool timed_out = waited >= timeout_nanoseconds;
    uint32_t num_missing;
    const int32_t count = Collect(batcher, minimum, timed_out, rows, &num_missing);
    if (count > 0) return count;
    // Requests after this store see `wake_at`.
    header->wake_at.store(requests + num_missing);
    FutexWait(&header->doorbell, requests,
              std::min(kLongestWaitNanoseconds,
                       timed_out ? kLongestWaitNanoseconds : timeout_nanoseconds - waited));
    header->wake_at.store(requests + kNever);
  }
}

// Gives the actors of collected rows their actions, in the rows' order. Skips actors that were
// reset since.
EXPORT void row_batcher_answer(void* handle, const uint8_t* rows, uint32_t num_rows,
                               const uint8_t* actions) {
  auto* batcher = static_cast<RowBatcher*>(handle);
  SegmentHeader* header = batcher->header;
  const uint64_t action_bytes = header->action_bytes == 0 ? sizeof(int32_t) : header->action_bytes;
  std::lock_guard<std::mutex> lock(batcher->mutex);
  for (uint32_t i = 0; i < num_rows; ++i) {
    WireRowHeader sent;
    memcpy(&sent, rows + i * batcher->row_bytes, sizeof(sent));
    Actor& actor = batcher->actors[sent.actor];
    if (!actor.is_sent) continue;
    ActorBlock* block = GetActorBlock(header, sent.actor);
    memcpy(header->action_bytes == 0 ? reinterpret_cast<char*>(&block->action)
                                     : GetAction(header, sent.actor),
           actions + i * action_bytes, action_bytes);
    actor.is_sent = false;
    ++actor.num_answered;
    if (block->state.exchange(kAnswered) == kSleeping) FutexWake(&block->state);
  }
}

// Forgets the row of an actor whose process has ended; a new one may connect.
EXPORT void row_batcher_reset(void* handle, uint32_t index) {
  auto* batcher = static_cast<RowBatcher*>(handle);
  std::lock_guard<std::mutex> lock(batcher->mutex);
  batcher->actors[index] = Actor();
  ActorBlock* block = GetActorBlock(batcher->header, index);
  block->finished.store(0);
  block->non_finite = 0;
  block->state.store(kIdle);
}

// Fails waiting and later calls, here and in the actor processes.
EXPORT void row_batcher_close(void* handle) {
  auto* batcher = static_cast<RowBatcher*>(handle);
  SegmentHeader* header = batcher->header;
  header->closed.store(1);
  header->doorbell.fetch_add(1);
  FutexWake(&header->doorbell);
  for (uint32_t i = 0; i < header->num_actors; ++i) {
    // Changing the state also keeps an actor that is about to sleep from doing so.
    ActorBlock* block = GetActorBlock(header, i);
    uint32_t state = kSleeping;
    if (block->state.compare_exchange_strong(state, kRequested)) FutexWake(&block->state);
  }
}

// Writes, for each actor, its state, a number that changes with each row sent and each action taken,
// and its answered rows since it was reset. Returns whether the batcher is closed.
EXPORT int row_batcher_activity(void* handle, uint32_t* states, int64_t* progress,
                                int64_t* answered) {
  auto* batcher = static_cast<RowBatcher*>(handle);
  std::lock_guard<std::mutex> lock(batcher->mutex);
  for (uint32_t i = 0; i < batcher->actors.size(); ++i) {
    const ActorBlock* block = GetActorBlock(batcher->header, i);
    states[i] = block->state.load();
    progress[i] = block->environment_nanoseconds.load(std::memory_order_relaxed) +
                  block->waiting_nanoseconds.load(std::memory_order_relaxed);
    answered[i] = batcher->actors[i].num_answered;
  }
  return batcher->header->closed.load() != 0;
}
