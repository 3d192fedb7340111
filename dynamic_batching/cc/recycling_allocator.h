// An allocator that keeps large blocks for the next tensor of about the same size.

#ifndef DYNAMIC_BATCHING_CC_RECYCLING_ALLOCATOR_H_
#define DYNAMIC_BATCHING_CC_RECYCLING_ALLOCATOR_H_

#include <mutex>
#include <unordered_map>
#include <vector>

#include "tensorflow/core/framework/allocator.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace dynamic_batching {

// A batch of trajectories takes tens of megabytes. malloc maps blocks of that size anew each time,
// and the page faults cost more than the copy into the block.
class RecyclingAllocator : public tensorflow::Allocator {
 public:
  // Lives as long as the process, since tensors may outlive the op that allocated them.
  static RecyclingAllocator* Get() {
    static auto* allocator = new RecyclingAllocator();
    return allocator;
  }

  std::string Name() override { return "dynamic_batching_recycling"; }

  void* AllocateRaw(size_t alignment, size_t num_bytes) override {
    size_t size = kSmallestBlock;
    while (size < num_bytes) size *= 2;
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<void*>& blocks = free_[size];
    void* block;
    if (blocks.empty()) {
      block = tensorflow::cpu_allocator()->AllocateRaw(kAllocatorAlignment, size);
      if (block == nullptr) return nullptr;
    } else {
      block = blocks.back();
      blocks.pop_back();
    }
    sizes_[block] = size;
    return block;
  }

  void DeallocateRaw(void* block) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto size = sizes_.find(block);
    std::vector<void*>& blocks = free_[size->second];
    sizes_.erase(size);
    if (blocks.size() < kBlocksKept) {
      blocks.push_back(block);
    } else {
      tensorflow::cpu_allocator()->DeallocateRaw(block);
    }
  }

 private:
  static constexpr size_t kSmallestBlock = 4096;
  static constexpr size_t kBlocksKept = 4;  // Per size.

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;
  std::unordered_map<void*, size_t> sizes_;
};

// Returns the allocator for batches that an op on the CPU makes. With a GPU it is the allocator of
// pinned memory, which the driver reads without an extra copy and TensorFlow recycles itself.
inline tensorflow::Allocator* BatchAllocator(const tensorflow::OpKernelContext* context) {
  tensorflow::AllocatorAttributes pinned;
  pinned.set_on_host(true);
  pinned.set_gpu_compatible(true);
  tensorflow::Allocator* const allocator = context->device()->GetAllocator(pinned);
  // Without a GPU, TensorFlow returns its default allocator.
  const bool has_gpu = allocator != context->device()->GetAllocator({});
  return has_gpu ? allocator : RecyclingAllocator::Get();
}

}  // namespace dynamic_batching

#endif  // DYNAMIC_BATCHING_CC_RECYCLING_ALLOCATOR_H_
