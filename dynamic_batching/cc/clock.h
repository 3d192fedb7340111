// The clock by which waits and ages are measured.

#ifndef DYNAMIC_BATCHING_CC_CLOCK_H_
#define DYNAMIC_BATCHING_CC_CLOCK_H_

#include <time.h>

#include <cstdint>

namespace dynamic_batching {

inline uint64_t NowNanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

}  // namespace dynamic_batching

#endif  // DYNAMIC_BATCHING_CC_CLOCK_H_
