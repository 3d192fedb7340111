// The memory that actor processes share with the batcher: its layout, and how the two sides wake
// each other. Independent of TensorFlow, because actor processes load it.
//
// A segment holds one block and one action per actor, and a number of unrolls. An unroll stores `rows` rows of each
// input field, field after field, so that a row is contiguous and a whole unroll can be copied into
// a time-major batch row by row. Outputs and recurrent state stay in the batcher's own memory: an
// actor process needs nothing but its next action, and cannot damage what it cannot see.
//
// Who writes what: the batcher makes every decision. It puts the action, and the unroll and row to
// write next, into the actor's block. The actor only writes that row and then moves `state` from
// kAnswered, via kActing, to kRequested. So an actor that is killed, at any instruction, leaves
// behind at most a half-written row that was never requested.
//
// The actor replaces non-finite values in a row by zeros, so that they reach neither inference nor
// the recurrent state, and reports them with the request. The batcher does not pass unrolls with
// such rows on to the learner.

#ifndef DYNAMIC_BATCHING_CC_SHARED_SEGMENT_H_
#define DYNAMIC_BATCHING_CC_SHARED_SEGMENT_H_

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "clock.h"

namespace dynamic_batching {

// Changes with the layout, so that an actor process of another build rejects the segment.
constexpr uint64_t kSegmentMagic = 0x494d50414c410006;
constexpr int kMaxFields = 17;

// The fixed fields at the start of every row; the observation's fields follow.
enum FixedField : int {
  kReward,
  kEpisodeReturn,
  kEpisodeStep,
  kEpisodeFrames,
  kEnd,
  kFirstObservation,
};

// How an episode ended: the values of impala.trajectory.EpisodeEnd. A lost life ends the episode
// for the agent only; the game continues, and so do the counts of its return, steps and frames.
enum EpisodeEnd : uint8_t { kNotEnded, kTerminated, kTruncated, kLifeLost };

enum RequestState : uint32_t {
  kIdle,       // No row was sent since the segment was made or the actor was reset.
  kRequested,  // A row is written and waits for its action.
  kSleeping,   // As kRequested, and the actor sleeps on `state`.
  kAnswered,   // The action, `unroll` and `row` are valid.
  kActing,     // As kAnswered, and the environment executes the action.
};

struct FieldLayout {
  uint64_t row_bytes;
  uint64_t offset;  // From the start of an unroll.
};

struct SegmentHeader {
  uint64_t magic;
  uint64_t segment_bytes;
  uint64_t actions_offset;
  uint64_t action_bytes;
  uint64_t unrolls_offset;
  uint64_t unroll_bytes;
  uint32_t num_actors;
  uint32_t num_unrolls;
  uint32_t rows;
  uint32_t num_fields;
  FieldLayout fields[kMaxFields];
  // Counts requests; the batcher sleeps until this reaches `wake_at`.
  alignas(64) std::atomic<uint32_t> doorbell;
  alignas(64) std::atomic<uint32_t> wake_at;
  alignas(64) std::atomic<uint32_t> closed;
};

struct alignas(128) ActorBlock {
  std::atomic<uint32_t> state;
  uint32_t unroll;
  uint32_t row;
  int32_t action;  // If it is an int32 scalar; others are at GetAction().
  // Written by the actor, read for the stage timers; a stale value does no harm.
  std::atomic<uint64_t> environment_nanoseconds;
  std::atomic<uint64_t> waiting_nanoseconds;
  // No batch waits for the actor: it will not ask for another action, or not soon.
  std::atomic<uint32_t> finished;
  // For the requested row, written by the actor before `state`: which parts were not finite (bit 0
  // the reward, bit i + 1 observation i), and the first non-finite value.
  uint32_t non_finite;
  float non_finite_value;
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "futex words must be plain memory");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "timers must be plain memory");

constexpr uint64_t kAlignment = 64;
inline uint64_t AlignUp(uint64_t bytes) { return (bytes + kAlignment - 1) & ~(kAlignment - 1); }

inline ActorBlock* GetActorBlock(void* segment, uint32_t actor) {
  return reinterpret_cast<ActorBlock*>(static_cast<char*>(segment) +
                                       AlignUp(sizeof(SegmentHeader))) +
         actor;
}

inline char* GetAction(void* segment, uint32_t actor) {
  const auto* header = static_cast<const SegmentHeader*>(segment);
  return static_cast<char*>(segment) + header->actions_offset +
         actor * AlignUp(header->action_bytes);
}

inline char* GetRow(void* segment, uint32_t unroll, int field, uint32_t row) {
  const auto* header = static_cast<const SegmentHeader*>(segment);
  const FieldLayout& layout = header->fields[field];
  return static_cast<char*>(segment) + header->unrolls_offset + unroll * header->unroll_bytes +
         layout.offset + row * layout.row_bytes;
}

// Computes all offsets and sizes from `num_actors`, `num_unrolls`, `rows`, `num_fields`,
// `action_bytes` and the fields' `row_bytes`.
inline void ComputeLayout(SegmentHeader* header) {
  uint64_t offset = 0;
  for (uint32_t i = 0; i < header->num_fields; ++i) {
    header->fields[i].offset = offset;
    offset = AlignUp(offset + header->fields[i].row_bytes * header->rows);
  }
  header->unroll_bytes = offset;
  header->actions_offset =
      AlignUp(AlignUp(sizeof(SegmentHeader)) + header->num_actors * sizeof(ActorBlock));
  header->unrolls_offset =
      header->actions_offset + header->num_actors * AlignUp(header->action_bytes);
  header->segment_bytes = header->unrolls_offset + header->num_unrolls * header->unroll_bytes;
}

// Sleeps while `*word == expected`, at most `timeout_nanoseconds`. May wake up spuriously.
inline void FutexWait(std::atomic<uint32_t>* word, uint32_t expected,
                      uint64_t timeout_nanoseconds) {
  timespec timeout;
  timeout.tv_sec = timeout_nanoseconds / 1000000000;
  timeout.tv_nsec = timeout_nanoseconds % 1000000000;
  syscall(SYS_futex, word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

inline void FutexWake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

}  // namespace dynamic_batching

#endif  // DYNAMIC_BATCHING_CC_SHARED_SEGMENT_H_
