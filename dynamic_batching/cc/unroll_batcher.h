// The batcher of the actor processes: gathers the rows of waiting actors into one batch, scatters
// the agent's outputs back, and hands full unrolls to the learner in the order they were filled.

#ifndef DYNAMIC_BATCHING_CC_UNROLL_BATCHER_H_
#define DYNAMIC_BATCHING_CC_UNROLL_BATCHER_H_

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "shared_segment.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace dynamic_batching {

// Shapes and types of what a row and an unroll consist of.
struct UnrollSpec {
  std::vector<tensorflow::DataType> input_types, output_types, state_types;
  std::vector<tensorflow::TensorShape> input_shapes, output_shapes, state_shapes;
};

struct UnrollBatcherOptions {
  int num_unrolls;
  int rows;  // T + 1
  int minimum_batch_size;
  int maximum_batch_size;
  uint64_t timeout_nanoseconds;
  int64_t max_discarded_in_a_row;  // After which the batcher closes itself; 0: never.
};

// Of the unrolls that are full. One with a row that was not finite is discarded instead of queued.
struct UnrollCounts {
  int64_t queued = 0;
  int64_t discarded = 0;
  int64_t discarded_in_a_row = 0;  // Since one was queued, while there was room in the queue.
  // The last row that was not finite: whose it was, and what; see ActorBlock.
  int32_t non_finite_actor = -1;
  uint32_t non_finite = 0;
  float non_finite_value = 0;
};

// Stages that StageSeconds() times, in its order.
constexpr const char* kStageNames[] = {
    "actor/environment", "actor/wait",      "batcher/wait", "batcher/gather",
    "batcher/inference", "batcher/scatter", "queue/wait",   "queue/copy"};

class UnrollBatcher : public std::enable_shared_from_this<UnrollBatcher> {
 public:
  using Done = std::function<void()>;

  // Formats the memory behind `fd`, which stays the caller's; its contents must be zeros. `state`
  // rows start as zeros, as does the action before the first.
  static absl::Status Create(int fd, UnrollSpec spec, const UnrollBatcherOptions& options,
                             std::vector<int32_t> level_ids,
                             std::shared_ptr<UnrollBatcher>* batcher);
  ~UnrollBatcher();

  // Asks for one batch of waiting rows. The outputs of `context` are actor ids, epochs, the
  // inputs, the last action and the recurrent state; `done` is called as soon as the batch policy
  // is met: `minimum_batch_size` rows wait (fewer, in proportion, while actors wait for the
  // learner or have finished), or one does and the time-out is over.
  void GetInputs(tensorflow::OpKernelContext* context, Done done);

  // Scatters the results of a batch and wakes its actors. An actor that was reset in between (its
  // epoch has changed) is left alone.
  absl::Status SetOutputs(const tensorflow::Tensor& actors, const tensorflow::Tensor& epochs,
                          int64_t policy_version, const tensorflow::OpInputList& outputs,
                          const tensorflow::OpInputList& states);

  // Asks for `batch_size` full unrolls, first in, first out, as one time-major batch with the first
  // `num_inputs` of the inputs.
  void Dequeue(tensorflow::OpKernelContext* context, int batch_size, int num_inputs, Done done);

  // Throws away the unfinished unroll of an actor whose process is gone; a new one may connect.
  absl::Status ResetActor(int actor);

  // Fails whoever waits, here and in the actor processes. Safe to call at any time, repeatedly.
  void Close();

  // Per actor: unrolls that it has completed since its last reset, learned from or not.
  std::vector<int64_t> CompletedUnrolls();

  // What an actor is doing. `progress` changes with each row sent and each action taken.
  struct Activity {
    RequestState state;
    int64_t progress;
  };
  std::vector<Activity> Activities() const;
  bool IsClosed() const { return header_->closed.load() != 0; }

  UnrollCounts Counts();

  // Batches handed out so far, and the rows in them.
  int64_t NumBatches() const { return batches_; }
  int64_t NumRows() const { return rows_; }

  // Seconds spent so far in each of kStageNames, summed over actors.
  std::vector<double> StageSeconds() const;

 private:
  struct Actor {
    int unroll = 0;
    int row = 0;        // The row that the actor has requested, or will next.
    int64_t epoch = 0;  // Grows when the process is replaced.
    bool in_batch = false;
    uint64_t arrival = 0;  // When its request was noticed, in requests; 0: there is none.
    int64_t completed_unrolls = 0;
    std::vector<std::string> states;  // Per state: the bytes before `row`.
  };

  // The part of an unroll that actor processes never see.
  struct Unroll {
    int actor = 0;
    bool is_spoiled = false;  // A row of it was not finite.
    int64_t policy_version = 0;
    std::vector<std::string> outputs;  // Per output: the bytes of all rows.
    std::vector<std::string> states;   // Per state: the bytes before row 0.
  };

  // An op that waits for `done`. `cancelled` outlives it: the cancellation callback may come late.
  struct Waiter {
    tensorflow::OpKernelContext* context;
    Done done;
    int batch_size = 0;
    int num_inputs = 0;
    uint64_t since = 0;
    std::shared_ptr<std::atomic<bool>> cancelled;
    tensorflow::CancellationToken token = tensorflow::CancellationManager::kInvalidToken;
  };

  // A place in a batch: an actor, and which of the processes that had its number.
  struct Ticket {
    int32_t actor;
    int64_t epoch;
  };

  UnrollBatcher(void* segment, UnrollSpec spec, const UnrollBatcherOptions& options,
                std::vector<int32_t> level_ids);

  void GatherLoop();
  void DequeueLoop();

  void AddWaiter(Waiter waiter, std::deque<Waiter>* waiters);
  void Finish(Waiter waiter, const absl::Status& status);
  // Finishes those that are cancelled and that no loop has taken up yet.
  void FinishCancelled(std::deque<Waiter>* waiters);
  void NotifyLoops();

  // Selects the actors of the next batch; none while the policy is not met: then `num_missing` is
  // the number of further requests to wait for.
  std::vector<Ticket> SelectActors(bool timed_out, int* num_missing);
  bool IsReady(int actor) const;
  void LookForNonFinite(int actor);
  // Whether nothing but unrolls to be discarded has come for too long.
  bool IsHopeless();
  void StartNextUnroll(int actor);
  absl::Status FillBatch(tensorflow::OpKernelContext* context, const std::vector<Ticket>& tickets);
  absl::Status AllocateBatch(const Waiter& waiter, std::vector<tensorflow::Tensor>* batch) const;
  void CopyUnroll(int unroll, int column, const Waiter& waiter,
                  std::vector<tensorflow::Tensor>* batch);

  void* const segment_;
  SegmentHeader* const header_;
  const UnrollSpec spec_;
  const UnrollBatcherOptions options_;
  const std::vector<int32_t> level_ids_;
  std::vector<size_t> output_bytes_, state_bytes_;  // Of one row.

  // Guards everything down to the timers. Held while actors are selected and results are written
  // back (a few kilobytes an actor), never while frames are copied into a batch.
  std::mutex mutex_;
  std::vector<Actor> actors_;
  std::vector<Unroll> unrolls_;
  std::vector<int> free_unrolls_;
  std::deque<int> full_unrolls_;
  std::deque<Waiter> input_waiters_;
  std::deque<Waiter> dequeue_waiters_;
  uint64_t arrivals_ = 0;
  UnrollCounts counts_;
  std::condition_variable inputs_wanted_;
  std::condition_variable unrolls_changed_;

  std::atomic<int64_t> batches_{0}, rows_{0};
  std::atomic<uint64_t> gathered_at_{0};
  std::atomic<uint64_t> request_wait_{0}, gather_{0}, inference_{0}, scatter_{0};
  std::atomic<uint64_t> queue_wait_{0}, queue_copy_{0};
};

}  // namespace dynamic_batching

#endif  // DYNAMIC_BATCHING_CC_UNROLL_BATCHER_H_
