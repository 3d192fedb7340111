#include "batcher.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "recycling_allocator.h"

namespace dynamic_batching {
namespace {

using tensorflow::DataTypeString;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::tstring;

// Rows are slices along the leading dimension.
void CopyRow(const Tensor& source, size_t source_row, size_t source_rows, Tensor* target,
             size_t target_row, size_t target_rows) {
  if (source.dtype() == tensorflow::DT_STRING) {
    const int64_t elements = source.NumElements() / source_rows;
    const tstring* from = source.flat<tstring>().data() + source_row * elements;
    std::copy(from, from + elements, target->flat<tstring>().data() + target_row * elements);
  } else {
    const size_t bytes = source.tensor_data().size() / source_rows;
    std::memcpy(const_cast<char*>(target->tensor_data().data()) + target_row * bytes,
                source.tensor_data().data() + source_row * bytes, bytes);
  }
}

absl::Status CancelledError() { return absl::CancelledError("The caller was cancelled."); }

}  // namespace

Batcher::Batcher(BatchedFunction function, const BatchPolicy& policy)
    : function_(std::move(function)), policy_(policy) {
  if (policy_.minimum_batch_size > 1 && policy_.timeout.has_value()) {
    // Detached: a callback on this thread may drop the last reference, and a thread cannot join
    // itself. Close() ends it.
    Ref();
    std::thread([this] { WatchTime(); }).detach();
  }
}

absl::Status Batcher::ClosedError() const {
  return absl::CancelledError(absl::StrCat("The batcher of '", function_.name, "' is closed."));
}

absl::Status Batcher::CheckRow(OpKernelContext* context) const {
  const size_t num_inputs = function_.input_types.size();
  if (context->num_inputs() - 1 != num_inputs) {
    return absl::InvalidArgumentError(absl::StrCat("'", function_.name, "' takes ", num_inputs,
                                                   " tensors, not ", context->num_inputs() - 1));
  }
  for (size_t i = 0; i < num_inputs; ++i) {
    const tensorflow::DataType type = context->input_dtype(i + 1);
    if (type != function_.input_types[i]) {
      return absl::InvalidArgumentError(
          absl::StrCat("Input ", function_.input_names[i], " of '", function_.name, "' has type ",
                       DataTypeString(type), ", but the batcher was made for ",
                       DataTypeString(function_.input_types[i])));
    }
    const TensorShape& shape = context->input(i + 1).shape();
    if (shape != function_.row_shapes[i]) {
      return absl::InvalidArgumentError(
          absl::StrCat("Input ", function_.input_names[i], " of '", function_.name, "' has shape ",
                       shape.DebugString(), ", but the batcher was made for ",
                       function_.row_shapes[i].DebugString()));
    }
  }
  return absl::OkStatus();
}

void Batcher::Call(OpKernelContext* context, DoneCallback done) {
  absl::Status status = CheckRow(context);
  std::shared_ptr<Batch> batch;
  if (status.ok()) {
    tensorflow::CancellationManager* const manager = context->cancellation_manager();
    const bool timed = policy_.minimum_batch_size > 1 && policy_.timeout.has_value();
    Caller caller{0, context, nullptr, tensorflow::CancellationManager::kInvalidToken, {}, false};
    if (manager != nullptr) caller.token = manager->get_cancellation_token();
    if (timed) caller.arrival = Clock::now();

    std::lock_guard<std::mutex> lock(mutex_);
    caller.id = next_id_++;
    if (closed_) {
      status = ClosedError();
    } else if (manager != nullptr) {
      // Under the lock, so that a cancellation finds the caller in `waiting_`.
      Ref();
      if (!manager->RegisterCallback(caller.token, [this, id = caller.id] {
            Cancel(id);
            Unref();
          })) {
        Unref();
        status = CancelledError();
      }
    }
    if (status.ok()) {
      caller.done = std::move(done);
      waiting_.push_back(std::move(caller));
      if (running_ == nullptr) {
        if (MayStart()) {
          batch = TakeBatch();
        } else if (timed && waiting_.size() == 1) {
          timer_wake_.notify_one();
        }
      }
    }
  }
  if (!status.ok()) {
    context->SetStatus(status);
    done();
  } else if (batch != nullptr) {
    Compute(std::move(batch));
  }
}

// Requires the lock.
bool Batcher::MayStart() const {
  if (waiting_.size() >= policy_.minimum_batch_size) return true;
  return !waiting_.empty() && policy_.timeout.has_value() &&
         Clock::now() - waiting_.front().arrival >= *policy_.timeout;
}

// Requires the lock, and that no batch is running.
std::shared_ptr<Batcher::Batch> Batcher::TakeBatch() {
  running_ = std::make_shared<Batch>();
  if (waiting_.size() <= policy_.maximum_batch_size) {
    running_->callers.swap(waiting_);
  } else {
    const auto end = waiting_.begin() + policy_.maximum_batch_size;
    running_->callers.assign(std::make_move_iterator(waiting_.begin()),
                             std::make_move_iterator(end));
    waiting_.erase(waiting_.begin(), end);
  }
  return running_;
}

void Batcher::ComputeInPool(std::shared_ptr<Batch> batch) {
  Ref();
  auto* const runner = batch->callers.front().context->runner();
  (*runner)([this, batch = std::move(batch)]() mutable {
    {
      // Callers that have arrived since the batch was taken need not wait for another one.
      std::lock_guard<std::mutex> lock(mutex_);
      // If all callers have cancelled, the batch is cancelled, so no further callers may join it.
      const bool abandoned = std::all_of(batch->callers.begin(), batch->callers.end(),
                                         [](const Caller& caller) { return caller.cancelled; });
      const size_t room = abandoned ? 0 : policy_.maximum_batch_size - batch->callers.size();
      const auto end = waiting_.begin() + std::min(room, waiting_.size());
      batch->callers.insert(batch->callers.end(), std::make_move_iterator(waiting_.begin()),
                            std::make_move_iterator(end));
      waiting_.erase(waiting_.begin(), end);
    }
    Compute(std::move(batch));
    Unref();
  });
}

void Batcher::Compute(std::shared_ptr<Batch> batch) {
  Ref();
  absl::Status status = batch->cancellation.IsCancelled()
                            ? absl::CancelledError("The batch was cancelled.")
                            : Gather(batch.get());
  if (!status.ok()) {
    Finish(batch, std::move(status));
    Unref();
    return;
  }
  // Compute the batch on this thread instead of the pool. Only the first closure may run in place:
  // asynchronous operations that end at once would nest without limit.
  OpKernelContext* const context = batch->callers.front().context;
  batch->runner = [pool = context->runner(), first = true](std::function<void()> closure) mutable {
    if (std::exchange(first, false)) {
      closure();
    } else {
      (*pool)(std::move(closure));
    }
  };
  tensorflow::FunctionLibraryRuntime::Options options;
  options.step_container = context->step_container();
  // Not the callers' cancellation managers: one caller's cancellation must not stop the others.
  options.cancellation_manager = &batch->cancellation;
  options.runner = &batch->runner;
  // Run the function as one task instead of one task per input and variable.
  options.run_all_kernels_inline = true;
  // The capture keeps `batch`, which owns the runner, alive until the runner has returned.
  function_.library->Run(options, function_.handle, batch->arguments, &batch->results,
                         [this, batch](const absl::Status& status) {
                           Finish(batch, status);
                           Unref();
                         });
}

absl::Status Batcher::Gather(Batch* batch) const {
  const size_t rows = batch->callers.size();
  batch->arguments.reserve(function_.row_shapes.size() + function_.captured.size());
  for (size_t i = 0; i < function_.row_shapes.size(); ++i) {
    if (rows == 1) {
      batch->arguments.push_back(batch->callers.front().context->input(i + 1));
      continue;
    }
    TensorShape shape = function_.row_shapes[i];
    shape.set_dim(0, rows);
    Tensor tensor(RecyclingAllocator::Get(), function_.input_types[i], shape);
    if (!tensor.IsInitialized()) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "No memory for a batch of ", rows, " rows of input ", function_.input_names[i]));
    }
    for (size_t row = 0; row < rows; ++row) {
      CopyRow(batch->callers[row].context->input(i + 1), 0, 1, &tensor, row, rows);
    }
    batch->arguments.push_back(std::move(tensor));
  }
  batch->arguments.insert(batch->arguments.end(), function_.captured.begin(),
                          function_.captured.end());
  return absl::OkStatus();
}

void Batcher::Finish(const std::shared_ptr<Batch>& batch, absl::Status status) {
  batch->arguments.clear();
  if (status.ok()) status = CheckResults(*batch);
  std::shared_ptr<Batch> next;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    running_ = nullptr;
    if (closed_ && !status.ok()) status = ClosedError();
    if (MayStart()) {
      next = TakeBatch();
    } else if (!waiting_.empty()) {
      timer_wake_.notify_one();
    }
  }
  // Start the next batch before scattering the results, so that the two overlap. Use the pool,
  // since this thread may belong to a caller whose answer is ready now.
  if (next != nullptr) ComputeInPool(std::move(next));
  for (size_t row = 0; row < batch->callers.size(); ++row) {
    Caller& caller = batch->callers[row];
    FinishCaller(&caller, caller.cancelled ? CancelledError()
                          : status.ok()    ? Scatter(*batch, row)
                                           : status);
  }
}

absl::Status Batcher::CheckResults(const Batch& batch) const {
  const int64_t rows = batch.callers.size();
  for (size_t i = 0; i < batch.results.size(); ++i) {
    const Tensor& result = batch.results[i];
    if (result.dims() == 0 || result.dim_size(0) != rows) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Output ", i, " of '", function_.name, "' has shape ", result.shape().DebugString(),
          " for a batch of ", rows, " rows, but its leading dimension must be that of the batch"));
    }
  }
  return absl::OkStatus();
}

absl::Status Batcher::Scatter(const Batch& batch, size_t row) const {
  OpKernelContext* const context = batch.callers[row].context;
  const size_t rows = batch.callers.size();
  if (context->num_outputs() != batch.results.size()) {
    return absl::InvalidArgumentError(absl::StrCat("'", function_.name, "' returns ",
                                                   batch.results.size(), " tensors, not ",
                                                   context->num_outputs()));
  }
  for (size_t i = 0; i < batch.results.size(); ++i) {
    const Tensor& result = batch.results[i];
    if (result.dtype() != context->expected_output_dtype(i)) {
      return absl::InvalidArgumentError(
          absl::StrCat("Output ", i, " of '", function_.name, "' has type ",
                       DataTypeString(result.dtype()), ", but the caller expects ",
                       DataTypeString(context->expected_output_dtype(i))));
    }
    if (rows == 1) {
      context->set_output(i, result);
      continue;
    }
    // Copied, because a slice would keep the whole batch alive as long as the caller keeps it.
    TensorShape shape = result.shape();
    shape.set_dim(0, 1);
    Tensor* output;
    TF_RETURN_IF_ERROR(context->allocate_output(i, shape, &output));
    CopyRow(result, row, rows, output, 0, 1);
  }
  return absl::OkStatus();
}

void Batcher::FinishCaller(Caller* caller, const absl::Status& status) {
  // DeregisterCallback() would block until a running cancellation ends, which may itself wait for
  // this thread. If the callback runs already, it drops its reference itself.
  if (caller->token != tensorflow::CancellationManager::kInvalidToken &&
      caller->context->cancellation_manager()->TryDeregisterCallback(caller->token)) {
    Unref();
  }
  if (!status.ok()) caller->context->SetStatus(status);
  // Moved out, since `done` may delete the context and its owner.
  const DoneCallback done = std::move(caller->done);
  done();
}

void Batcher::Cancel(uint64_t id) {
  std::optional<Caller> removed;
  std::shared_ptr<Batch> abandoned;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto has_id = [id](const Caller& caller) { return caller.id == id; };
    const auto found = std::find_if(waiting_.begin(), waiting_.end(), has_id);
    if (found != waiting_.end()) {
      removed = std::move(*found);
      waiting_.erase(found);
    } else if (running_ != nullptr) {
      auto& callers = running_->callers;
      const auto running = std::find_if(callers.begin(), callers.end(), has_id);
      if (running != callers.end()) {
        running->cancelled = true;
        if (std::all_of(callers.begin(), callers.end(),
                        [](const Caller& caller) { return caller.cancelled; })) {
          abandoned = running_;
        }
      }
    }
  }
  if (removed.has_value()) {
    FinishCaller(&*removed, CancelledError());
  }
  if (abandoned != nullptr) abandoned->cancellation.StartCancel();
}

void Batcher::Close() {
  std::vector<Caller> callers;
  std::shared_ptr<Batch> running;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    callers.swap(waiting_);
    running = running_;
    timer_wake_.notify_one();
  }
  for (Caller& caller : callers) FinishCaller(&caller, ClosedError());
  if (running != nullptr) running->cancellation.StartCancel();
}

void Batcher::WatchTime() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!closed_) {
    if (running_ != nullptr || waiting_.empty()) {
      timer_wake_.wait(lock);
    } else if (!MayStart()) {
      timer_wake_.wait_until(lock, waiting_.front().arrival + *policy_.timeout);
    } else {
      std::shared_ptr<Batch> batch = TakeBatch();
      lock.unlock();
      ComputeInPool(std::move(batch));
      lock.lock();
    }
  }
  lock.unlock();
  Unref();
}

}  // namespace dynamic_batching
