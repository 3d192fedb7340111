// The client of actors on another machine, whose rows arrive together: a plain C library for
// `group_client.py`. It writes them into the segment, as the actors' own processes would, and waits
// until all are answered.

#include <vector>

#include "segment_client.h"
#include "wire_row.h"

using namespace dynamic_batching;  // NOLINT: this file defines the library's interface.

namespace {

constexpr int32_t kMalformed = -3, kCancelled = -4;
// Bounds a wait whose cancellation came between its check and its sleep.
constexpr uint64_t kCheckCancelledNanoseconds = 100000000;

struct Group {
  SegmentHeader* header;
  std::vector<uint32_t> actors;
  uint32_t float_observations;  // Bit i: observation i consists of float32.
  // When each actor's last action was returned; 0 before that.
  std::vector<std::atomic<uint64_t>> returned_at;
  std::atomic<bool> is_cancelled;
};

// Returns whether the actor takes no part in a batch: the batcher has reset it, or has answered its
// last row and the group has taken the action.
bool MaySend(const ActorBlock* block) {
  const uint32_t state = block->state.load(std::memory_order_acquire);
  return state == kIdle || state == kActing;
}

void WriteRow(Group* group, uint32_t index, const uint8_t* wire) {
  SegmentHeader* header = group->header;
  const uint32_t actor = group->actors[index];
  ActorBlock* block = GetActorBlock(header, actor);
  const uint32_t unroll = block->unroll, row = block->row;
  WireRowHeader sent;
  memcpy(&sent, wire, sizeof(sent));
  // The actor's own process has already replaced such values. Checked again, because inference and
  // the recurrent state must not depend on what other machines send.
  const uint32_t num_observations = header->num_fields - kFirstObservation;
  uint32_t non_finite = sent.non_finite & ((2u << num_observations) - 1);
  float value = sent.non_finite_value;
  if (ReplaceNonFinite(&sent.reward, 1, &value)) non_finite |= 1;
  // An unroll begins with this row. Its recurrent state is the initial one, so the learner must
  // reset its own state here, too.
  if (block->state.load() == kIdle && sent.end == kNotEnded) sent.end = kTerminated;
  memcpy(GetRow(header, unroll, kReward, row), &sent.reward, sizeof(sent.reward));
  memcpy(GetRow(header, unroll, kEpisodeReturn, row), &sent.episode_return,
         sizeof(sent.episode_return));
  memcpy(GetRow(header, unroll, kEpisodeStep, row), &sent.episode_step, sizeof(sent.episode_step));
  memcpy(GetRow(header, unroll, kEpisodeFrames, row), &sent.episode_frames,
         sizeof(sent.episode_frames));
  memcpy(GetRow(header, unroll, kEnd, row), &sent.end, sizeof(sent.end));
  wire += sizeof(WireRowHeader);
  for (uint32_t field = kFirstObservation; field < header->num_fields; ++field) {
    const uint64_t bytes = header->fields[field].row_bytes;
    char* target = GetRow(header, unroll, field, row);
    memcpy(target, wire, bytes);
    wire += bytes;
    const uint32_t observation = field - kFirstObservation;
    if ((group->float_observations >> observation & 1) != 0 &&
        ReplaceNonFinite(reinterpret_cast<float*>(target), bytes / sizeof(float), &value)) {
      non_finite |= 2u << observation;
    }
  }
  block->non_finite = non_finite;
  block->non_finite_value = value;
}

}  // namespace

// Returns null if `fd` is not a segment of this build or lacks one of the actors.
EXPORT void* group_client_connect(int fd, const uint32_t* actors, uint32_t num_actors) {
  SegmentHeader* header = MapSegment(fd);
  if (header == nullptr) return nullptr;
  for (uint32_t i = 0; i < num_actors; ++i) {
    if (actors[i] < header->num_actors) continue;
    munmap(header, header->segment_bytes);
    return nullptr;
  }
  return new Group{header, {actors, actors + num_actors}, 0,
                   std::vector<std::atomic<uint64_t>>(num_actors), {false}};
}

EXPORT void group_client_disconnect(void* handle) {
  auto* group = static_cast<Group*>(handle);
  munmap(group->header, group->header->segment_bytes);
  delete group;
}

EXPORT uint64_t group_client_row_bytes(void* handle) {
  return WireRowBytes(*static_cast<Group*>(handle)->header);
}

// Returns the bytes of an action; 0 if it is an int32 scalar.
EXPORT uint64_t group_client_action_bytes(void* handle) {
  return static_cast<Group*>(handle)->header->action_bytes;
}

// Marks an observation as float32, so that its values are checked.
EXPORT void group_client_check_observation(void* handle, uint32_t index) {
  static_cast<Group*>(handle)->float_observations |= 1u << index;
}

// Returns kMalformed if the rows are not those of different actors of the group, kOutOfOrder if an
// actor's last row is still being answered, else how many rows have `is_first`. Changes nothing.
EXPORT int32_t group_client_check(void* handle, const uint8_t* rows, uint64_t num_rows) {
  auto* group = static_cast<Group*>(handle);
  const uint64_t row_bytes = WireRowBytes(*group->header);
  std::vector<bool> seen(group->actors.size());
  int32_t num_first = 0;
  for (uint64_t i = 0; i < num_rows; ++i) {
    WireRowHeader sent;
    memcpy(&sent, rows + i * row_bytes, sizeof(sent));
    if (sent.actor >= group->actors.size() || seen[sent.actor]) return kMalformed;
    if (sent.end > kLifeLost || sent.is_first > 1) return kMalformed;
    seen[sent.actor] = true;
    if (!MaySend(GetActorBlock(group->header, group->actors[sent.actor]))) return kOutOfOrder;
    num_first += sent.is_first;
  }
  return num_first;
}

// Sends rows that `group_client_check` has accepted, waits until all are answered, and writes their
// actions in the same order. Returns 0, kClosed if the batcher is closed, or kCancelled.
EXPORT int32_t group_client_step(void* handle, const uint8_t* rows, uint64_t num_rows,
                                 uint8_t* actions) {
  auto* group = static_cast<Group*>(handle);
  SegmentHeader* header = group->header;
  const uint64_t row_bytes = WireRowBytes(*header);
  if (header->closed.load(std::memory_order_acquire)) return kClosed;
  std::vector<uint32_t> indices;
  indices.reserve(num_rows);
  for (uint64_t i = 0; i < num_rows; ++i) {
    WireRowHeader sent;
    memcpy(&sent, rows + i * row_bytes, sizeof(sent));
    indices.push_back(sent.actor);
    WriteRow(group, sent.actor, rows + i * row_bytes);
  }
  const uint64_t requested_at = NowNanoseconds();
  for (uint32_t index : indices) {
    ActorBlock* block = GetActorBlock(header, group->actors[index]);
    if (group->returned_at[index] != 0) {
      AddNanoseconds(&block->environment_nanoseconds, requested_at - group->returned_at[index]);
    }
    block->finished.store(0);
    block->state.store(kRequested);
  }
  RingDoorbell(header, num_rows);
  for (uint32_t index : indices) {
    ActorBlock* block = GetActorBlock(header, group->actors[index]);
    while (block->state.load(std::memory_order_acquire) != kAnswered) {
      uint32_t state = kRequested;
      // The batcher makes a system call to wake an actor only if the state is kSleeping.
      if (!block->state.compare_exchange_strong(state, kSleeping) && state == kAnswered) break;
      // Checked after the state has changed: if the segment closes later, that wakes the actor.
      if (header->closed.load()) return kClosed;
      if (group->is_cancelled.load()) return kCancelled;
      FutexWait(&block->state, kSleeping, kCheckCancelledNanoseconds);
    }
  }
  const uint64_t returned_at = NowNanoseconds();
  const uint64_t action_bytes = header->action_bytes == 0 ? sizeof(int32_t) : header->action_bytes;
  for (uint32_t index : indices) {
    const uint32_t actor = group->actors[index];
    ActorBlock* block = GetActorBlock(header, actor);
    memcpy(actions, header->action_bytes == 0 ? reinterpret_cast<const char*>(&block->action)
                                              : GetAction(header, actor),
           action_bytes);
    actions += action_bytes;
    AddNanoseconds(&block->waiting_nanoseconds, returned_at - requested_at);
    group->returned_at[index] = returned_at;
    // The group owns the block until its next request.
    block->state.store(kActing, std::memory_order_relaxed);
  }
  return 0;
}

// Forgets that an actor was answered, after the batcher has reset it.
EXPORT void group_client_forget(void* handle, uint32_t index) {
  static_cast<Group*>(handle)->returned_at[index] = 0;
}

// Lets no batch wait for actors that have not sent a row for this long after their last action. May
// be called from any thread: if such an actor sends one just now, a batch may start without it.
EXPORT void group_client_skip_silent(void* handle, uint64_t nanoseconds) {
  auto* group = static_cast<Group*>(handle);
  const uint64_t now = NowNanoseconds();
  for (size_t i = 0; i < group->actors.size(); ++i) {
    ActorBlock* block = GetActorBlock(group->header, group->actors[i]);
    const uint64_t returned_at = group->returned_at[i].load(std::memory_order_relaxed);
    if (block->state.load() == kActing && now > returned_at + nanoseconds) block->finished.store(1);
  }
}

// Ends a step that waits, and every later one. May be called from any thread.
EXPORT void group_client_cancel(void* handle) {
  auto* group = static_cast<Group*>(handle);
  group->is_cancelled.store(true);
  for (uint32_t actor : group->actors) FutexWake(&GetActorBlock(group->header, actor)->state);
}
