// The in-process batcher: computes concurrent calls of a TensorFlow function, each with one row,
// together.

#ifndef DYNAMIC_BATCHING_CC_BATCHER_H_
#define DYNAMIC_BATCHING_CC_BATCHER_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "tensorflow/core/framework/cancellation.h"
#include "tensorflow/core/framework/function.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/refcount.h"

namespace dynamic_batching {

// When a batch is computed. A batcher computes at most one batch at a time; callers that arrive in
// the meantime wait for the next.
struct BatchPolicy {
  size_t minimum_batch_size = 1;
  size_t maximum_batch_size = 1024;
  // How long a caller waits for `minimum_batch_size` to be reached; nullopt to wait forever.
  std::optional<std::chrono::milliseconds> timeout;
};

// The function as the runtime knows it, and the specs of its rows.
struct BatchedFunction {
  std::string name;  // Used in messages, like `input_names`.
  tensorflow::FunctionLibraryRuntime* library = nullptr;
  tensorflow::FunctionLibraryRuntime::Handle handle = tensorflow::kInvalidHandle;
  // The library that defines the function, if it is not `library`.
  std::shared_ptr<const tensorflow::FunctionLibraryDefinition> definitions;
  std::vector<std::string> input_names;
  std::vector<tensorflow::DataType> input_types;
  std::vector<tensorflow::TensorShape> row_shapes;  // Of the inputs, with the leading 1.
  // Passed after the inputs with every batch: handles of variables, and constants.
  std::vector<tensorflow::Tensor> captured;
};

// Thread-safe. The handle, running batches, registered cancellations and the timer thread each hold
// a reference; any of them may drop the last one.
class Batcher : public tensorflow::core::RefCounted {
 public:
  using DoneCallback = tensorflow::AsyncOpKernel::DoneCallback;

  Batcher(BatchedFunction function, const BatchPolicy& policy);

  // Computes the row in inputs 1, 2, ... of `context` together with those of other callers, and
  // calls `done` when `context` has the outputs or an error. (Input 0 is the handle of this
  // batcher.) May compute the batch on the calling thread.
  void Call(tensorflow::OpKernelContext* context, DoneCallback done);

  // Fails waiting and future calls with CancelledError, and asks the running batch to stop early.
  // May be called at any time, repeatedly, from any thread.
  void Close();

 private:
  using Clock = std::chrono::steady_clock;

  struct Caller {
    uint64_t id;
    tensorflow::OpKernelContext* context;
    DoneCallback done;
    tensorflow::CancellationToken token;
    Clock::time_point arrival;  // Set only if there is a time-out.
    bool cancelled;             // Cancelled while its batch was computed.
  };

  struct Batch {
    std::vector<Caller> callers;
    std::vector<tensorflow::Tensor> arguments, results;
    tensorflow::CancellationManager cancellation;
    std::function<void(std::function<void()>)> runner;
  };

  ~Batcher() override = default;

  absl::Status CheckRow(tensorflow::OpKernelContext* context) const;
  bool MayStart() const;
  std::shared_ptr<Batch> TakeBatch();
  void Compute(std::shared_ptr<Batch> batch);
  void ComputeInPool(std::shared_ptr<Batch> batch);
  absl::Status Gather(Batch* batch) const;
  void Finish(const std::shared_ptr<Batch>& batch, absl::Status status);
  absl::Status CheckResults(const Batch& batch) const;
  absl::Status Scatter(const Batch& batch, size_t row) const;
  void FinishCaller(Caller* caller, const absl::Status& status);
  void Cancel(uint64_t id);
  void WatchTime();
  absl::Status ClosedError() const;

  const BatchedFunction function_;
  const BatchPolicy policy_;

  std::mutex mutex_;
  bool closed_ = false;
  uint64_t next_id_ = 0;
  std::vector<Caller> waiting_;
  // The batch that is being computed or is about to be. Under `mutex_`, callers may join it until
  // the computation starts, and may be marked as cancelled until it ends.
  std::shared_ptr<Batch> running_;
  std::condition_variable timer_wake_;
};

}  // namespace dynamic_batching

#endif  // DYNAMIC_BATCHING_CC_BATCHER_H_
