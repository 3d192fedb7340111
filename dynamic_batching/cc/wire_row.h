// The form in which the rows of actors travel to a policy on another machine: each is a header, then
// the observation's arrays in order, without gaps. Both machines are little-endian.

#ifndef DYNAMIC_BATCHING_CC_WIRE_ROW_H_
#define DYNAMIC_BATCHING_CC_WIRE_ROW_H_

#include "shared_segment.h"

namespace dynamic_batching {

struct WireRowHeader {
  uint32_t actor;  // Index among the actors that share a connection.
  float reward;
  float episode_return;
  int32_t episode_step;
  int32_t episode_frames;
  uint32_t non_finite;  // As in ActorBlock.
  float non_finite_value;
  uint8_t end;
  uint8_t is_first;  // The actor's process has started anew: no row led to this one.
  uint8_t unused[2];
};
static_assert(sizeof(WireRowHeader) == 32, "the rows of two builds must not differ");

inline uint64_t WireRowBytes(const SegmentHeader& header) {
  uint64_t bytes = sizeof(WireRowHeader);
  for (uint32_t i = kFirstObservation; i < header.num_fields; ++i) {
    bytes += header.fields[i].row_bytes;
  }
  return bytes;
}

}  // namespace dynamic_batching

#endif  // DYNAMIC_BATCHING_CC_WIRE_ROW_H_
