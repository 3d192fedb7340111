// What the clients of a segment have in common: how they map it and check what they write into it.

#ifndef DYNAMIC_BATCHING_CC_SEGMENT_CLIENT_H_
#define DYNAMIC_BATCHING_CC_SEGMENT_CLIENT_H_

#include <sys/mman.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>

#include "shared_segment.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace dynamic_batching {

// Interval at which sleeping clients check whether the segment was closed without waking them.
constexpr uint64_t kCheckClosedNanoseconds = 1000000000;

// Returned instead of an action or a count.
constexpr int32_t kClosed = -1, kOutOfOrder = -2;

// Returns null if `fd` is not a segment of this build. The caller unmaps `segment_bytes`.
inline SegmentHeader* MapSegment(int fd) {
  struct stat status;
  if (fstat(fd, &status) != 0 || status.st_size < static_cast<off_t>(sizeof(SegmentHeader))) {
    return nullptr;
  }
  void* segment =
      mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, /*offset=*/0);
  if (segment == MAP_FAILED) return nullptr;
  auto* header = static_cast<SegmentHeader*>(segment);
  if (header->magic != kSegmentMagic ||
      header->segment_bytes != static_cast<uint64_t>(status.st_size)) {
    munmap(segment, status.st_size);
    return nullptr;
  }
  return header;
}

// Needs no atomic addition, since only the actor writes its timers.
inline void AddNanoseconds(std::atomic<uint64_t>* timer, uint64_t nanoseconds) {
  timer->store(timer->load(std::memory_order_relaxed) + nanoseconds, std::memory_order_relaxed);
}

// Replaces non-finite values by 0. Returns whether there were any; `value` is then the first one.
inline bool ReplaceNonFinite(float* values, size_t size, float* value) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t any = 0;
  // Works on bits and without branches, so that compilers vectorize it.
  for (size_t i = 0; i < size; ++i) {
    uint32_t bits;
    memcpy(&bits, &values[i], sizeof(bits));
    any |= (bits & kExponent) == kExponent;
  }
  if (!any) return false;
  bool is_first = true;
  for (size_t i = 0; i < size; ++i) {
    if (std::isfinite(values[i])) continue;
    if (is_first) *value = values[i];
    is_first = false;
    values[i] = 0;
  }
  return true;
}

// Tells the batcher of `count` requests, whose states are already stored. Wakes it if they or
// earlier ones reached `wake_at`, which it moves out of reach as soon as it is awake.
inline void RingDoorbell(SegmentHeader* header, uint32_t count) {
  const uint32_t requests = header->doorbell.fetch_add(count) + count;
  if (static_cast<int32_t>(requests - header->wake_at.load()) >= 0) FutexWake(&header->doorbell);
}

}  // namespace dynamic_batching

#endif  // DYNAMIC_BATCHING_CC_SEGMENT_CLIENT_H_
