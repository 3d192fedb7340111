// The actor's client of the shared-memory batcher: a plain C library for `actor_client.py`. Uses
// neither TensorFlow nor Python's headers, which a machine that only runs Python does not have.

#include "segment_client.h"

using namespace dynamic_batching;  // NOLINT: this file defines the library's interface.

namespace {

struct Client {
  void* segment;
  SegmentHeader* header;
  ActorBlock* block;
  uint32_t actor;
  uint32_t float_observations;          // Bit i: observation i consists of float32.
  float non_finite_values[kMaxFields];  // Of the last row, indexed like the bits of `non_finite`.
  double episode_return;
  int32_t episode_step;
  int32_t episode_frames;
  bool is_waiting;        // The last row's action has not been waited for yet.
  uint64_t requested_at;  // When that row was sent.
  uint64_t returned_at;   // When the last action was returned; 0 before the first.
};

void WaitForAnswer(Client* client) {
  ActorBlock* block = client->block;
  while (true) {
    uint32_t state = kRequested;
    // The batcher makes a system call to wake an actor only if the state is kSleeping.
    if (!block->state.compare_exchange_strong(state, kSleeping) && state == kAnswered) return;
    // Checked after the state has changed: if the segment closes later, that wakes the actor.
    if (client->header->closed.load()) return;
    FutexWait(&block->state, kSleeping, kCheckClosedNanoseconds);
    if (block->state.load(std::memory_order_acquire) == kAnswered) return;
  }
}

}  // namespace

// Returns null if `fd` is not a segment of this build or has no such actor.
EXPORT void* actor_client_connect(int fd, uint32_t actor) {
  SegmentHeader* header = MapSegment(fd);
  if (header == nullptr) return nullptr;
  if (actor >= header->num_actors) {
    munmap(header, header->segment_bytes);
    return nullptr;
  }
  return new Client{header, header, GetActorBlock(header, actor), actor};
}

EXPORT void actor_client_disconnect(void* handle) {
  auto* client = static_cast<Client*>(handle);
  munmap(client->segment, client->header->segment_bytes);
  delete client;
}

EXPORT uint32_t actor_client_num_unrolls(void* handle) {
  return static_cast<Client*>(handle)->header->num_unrolls;
}

EXPORT uint32_t actor_client_rows(void* handle) {
  return static_cast<Client*>(handle)->header->rows;
}

EXPORT uint64_t actor_client_unroll_bytes(void* handle) {
  return static_cast<Client*>(handle)->header->unroll_bytes;
}

EXPORT uint32_t actor_client_num_observations(void* handle) {
  return static_cast<Client*>(handle)->header->num_fields - kFirstObservation;
}

EXPORT uint64_t actor_client_observation_bytes(void* handle, uint32_t index) {
  return static_cast<Client*>(handle)->header->fields[kFirstObservation + index].row_bytes;
}

// Returns the address of row 0 of unroll 0 of an observation.
EXPORT void* actor_client_observation(void* handle, uint32_t index) {
  return GetRow(static_cast<Client*>(handle)->segment, 0, kFirstObservation + index, 0);
}

// Marks an observation as float32, so that its values are checked.
EXPORT void actor_client_check_observation(void* handle, uint32_t index) {
  static_cast<Client*>(handle)->float_observations |= 1u << index;
}

// Returns the non-finite value of the last row with an index: 0 for the reward, i + 1 for the first
// such value of observation i.
EXPORT float actor_client_non_finite_value(void* handle, uint32_t index) {
  return static_cast<Client*>(handle)->non_finite_values[index];
}

// Returns the bytes of an action; 0 if it is an int32 scalar.
EXPORT uint64_t actor_client_action_bytes(void* handle) {
  return static_cast<Client*>(handle)->header->action_bytes;
}

// Returns the address of this actor's action, if it is not an int32 scalar.
EXPORT void* actor_client_action(void* handle) {
  auto* client = static_cast<Client*>(handle);
  return GetAction(client->segment, client->actor);
}

// Returns the address of two numbers: the unroll and row of the next observation.
EXPORT const uint32_t* actor_client_position(void* handle) {
  static_assert(offsetof(ActorBlock, row) == offsetof(ActorBlock, unroll) + sizeof(uint32_t), "");
  return &static_cast<Client*>(handle)->block->unroll;
}

// Returns whether no row was sent for this actor since it was reset.
EXPORT int actor_client_is_idle(void* handle) {
  return static_cast<Client*>(handle)->block->state.load() == kIdle;
}

// Sends the row whose observation the caller has already written. `frames` is the duration of the
// last action; `is_begin` marks a row that begins an episode and to which no action led, as the very
// first row. Returns kClosed if the batcher is closed, kOutOfOrder if the previous action was not
// waited for or the very first row was not sent as such, and otherwise ActorBlock::non_finite of the
// row.
EXPORT int32_t actor_client_send(void* handle, double reward, int frames, int end, int is_begin) {
  auto* client = static_cast<Client*>(handle);
  SegmentHeader* header = client->header;
  ActorBlock* block = client->block;
  if (header->closed.load(std::memory_order_acquire)) return kClosed;
  if (client->is_waiting || (!is_begin && client->returned_at == 0)) return kOutOfOrder;
  if (!is_begin) {
    client->episode_return += reward;
    client->episode_step += 1;
    client->episode_frames += frames;
  }
  const uint32_t unroll = block->unroll;
  const uint32_t row = block->row;
  const uint8_t end_byte = end;
  uint32_t non_finite = 0;
  float stored_reward = static_cast<float>(reward);
  if (ReplaceNonFinite(&stored_reward, 1, &client->non_finite_values[0])) non_finite = 1;
  for (uint32_t i = 0; client->float_observations >> i != 0; ++i) {
    if ((client->float_observations >> i & 1) == 0) continue;
    const int field = kFirstObservation + i;
    if (ReplaceNonFinite(reinterpret_cast<float*>(GetRow(client->segment, unroll, field, row)),
                         header->fields[field].row_bytes / sizeof(float),
                         &client->non_finite_values[i + 1])) {
      non_finite |= 2u << i;
    }
  }
  block->non_finite = non_finite;
  if (non_finite != 0) {
    block->non_finite_value = client->non_finite_values[__builtin_ctz(non_finite)];
  }
  // Summed in double precision: float would lose most of the rewards in an episode of a million
  // small ones.
  const float episode_return = static_cast<float>(client->episode_return);
  memcpy(GetRow(client->segment, unroll, kReward, row), &stored_reward, sizeof(stored_reward));
  memcpy(GetRow(client->segment, unroll, kEpisodeReturn, row), &episode_return,
         sizeof(episode_return));
  memcpy(GetRow(client->segment, unroll, kEpisodeStep, row), &client->episode_step,
         sizeof(client->episode_step));
  memcpy(GetRow(client->segment, unroll, kEpisodeFrames, row), &client->episode_frames,
         sizeof(client->episode_frames));
  memcpy(GetRow(client->segment, unroll, kEnd, row), &end_byte, sizeof(end_byte));
  if (end == kTerminated || end == kTruncated) {
    client->episode_return = 0;
    client->episode_step = 0;
    client->episode_frames = 0;
  }

  client->is_waiting = true;
  client->requested_at = NowNanoseconds();
  if (client->returned_at != 0) {
    AddNanoseconds(&block->environment_nanoseconds, client->requested_at - client->returned_at);
  }
  block->state.store(kRequested);
  RingDoorbell(header, 1);
  return non_finite;
}

// Declares that no more rows will follow, so that no batch waits for this actor.
EXPORT void actor_client_finish(void* handle) {
  auto* client = static_cast<Client*>(handle);
  client->block->finished.store(1);
  // The batcher may be waiting for more requests than there will be.
  client->header->doorbell.fetch_add(1);
  FutexWake(&client->header->doorbell);
}

// Waits for the answer to the last row and returns its action, kClosed or kOutOfOrder. Returns 0 if
// the action is not an int32 scalar.
EXPORT int32_t actor_client_wait(void* handle) {
  auto* client = static_cast<Client*>(handle);
  ActorBlock* block = client->block;
  if (!client->is_waiting) return kOutOfOrder;
  WaitForAnswer(client);
  if (block->state.load(std::memory_order_acquire) != kAnswered) return kClosed;
  client->is_waiting = false;
  client->returned_at = NowNanoseconds();
  AddNanoseconds(&block->waiting_nanoseconds, client->returned_at - client->requested_at);
  // The actor owns the block until its next request.
  block->state.store(kActing, std::memory_order_relaxed);
  return block->action;
}
