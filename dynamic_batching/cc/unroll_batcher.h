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

// Types and shapes of the parts of a row and an unroll.
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
  int64_t max_discarded_in_a_row;  // The batcher then closes itself; 0 for no limit.
};

// Counts of full unrolls. An unroll with a non-finite row is discarded instead of queued.
struct UnrollCounts {
  int64_t queued = 0;
  int64_t discarded = 0;
  int64_t discarded_in_a_row = 0;  // Since one was queued, while there was room in the queue.
  // The last non-finite row: its actor, parts and value; see ActorBlock.
  int32_t non_finite_actor = -1;
  uint32_t non_finite = 0;
  float non_finite_value = 0;
};

// The stages that StageSeconds() times, in the same order.
constexpr const char* kStageNames[] = {
    "actor/environment", "actor/wait",      "batcher/wait", "batcher/gather",
    "batcher/inference", "batcher/scatter", "queue/wait",   "queue/copy"};

class UnrollBatcher : public std::enable_shared_from_this<UnrollBatcher> {
 public:
  using Done = std::function<void()>;

  // Formats the memory behind `fd`, which the caller still owns; its contents must be zeros. The
  // recurrent states and the action before the first one start as zeros.
  static absl::Status Create(int fd, UnrollSpec spec, const UnrollBatcherOptions& options,
                             std::vector<int32_t> level_ids,
                             std::shared_ptr<UnrollBatcher>* batcher);
  ~UnrollBatcher();

  // Gets one batch of waiting rows. The outputs of `context` are actor ids, epochs, the inputs, the
  // last action and the recurrent state. `done` is called as soon as `minimum_batch_size` rows wait
  // (proportionally fewer while actors wait for the learner or have finished), or the time-out has
  // passed and at least one row waits.
  void GetInputs(tensorflow::OpKernelContext* context, Done done);

  // Scatters the results of a batch and wakes its actors. Skips actors that were reset in between,
  // whose epochs have changed.
  absl::Status SetOutputs(const tensorflow::Tensor& actors, const tensorflow::Tensor& epochs,
                          int64_t policy_version, const tensorflow::OpInputList& outputs,
                          const tensorflow::OpInputList& states);

  // Gets `batch_size` full unrolls, first in, first out, as one time-major batch with the first
  // `num_inputs` of the inputs.
  void Dequeue(tensorflow::OpKernelContext* context, int batch_size, int num_inputs, Done done);

  // Discards the unfinished unroll of an actor whose process has ended; a new one may connect.
  absl::Status ResetActor(int actor);
  // The same, and the actor's unrolls from now on have this level. No batch waits for the actor
  // until its next row.
  absl::Status AssignActor(int actor, int32_t level_id);

  // Fails all waiting calls, here and in the actor processes. May be called at any time and
  // repeatedly.
  void Close();

  // For each actor, full unrolls since its last reset, including discarded ones.
  std::vector<int64_t> CompletedUnrolls();
  // For each actor, the version of the policy that began its last completed unroll; -1 if there is
  // none since its last reset.
  std::vector<int64_t> PolicyVersions();

  // The state of an actor. `progress` changes with each row sent and each action taken.
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
    int row = 0;        // The requested row, or the next one to be requested.
    int64_t epoch = 0;  // Increases when the process is replaced.
    bool in_batch = false;
    uint64_t arrival = 0;  // Sequence number of its request; 0 if there is none.
    int32_t level_id = 0;
    int64_t completed_unrolls = 0;
    int64_t policy_version = -1;  // Of the last completed unroll; -1 if there is none.
    std::vector<std::string> states;  // For each state, its bytes before `row`.
  };

  // The part of an unroll that actor processes never see.
  struct Unroll {
    int actor = 0;
    int32_t level_id = 0;
    bool is_spoiled = false;  // Some row had non-finite values.
    int64_t policy_version = 0;
    std::vector<std::string> outputs;  // For each output, the bytes of all rows.
    std::vector<std::string> states;   // For each state, its bytes before row 0.
  };

  // A pending op, which ends with `done`. `cancelled` is shared, since the cancellation callback
  // may run after the op has ended.
  struct Waiter {
    tensorflow::OpKernelContext* context;
    Done done;
    int batch_size = 0;
    int num_inputs = 0;
    uint64_t since = 0;
    std::shared_ptr<std::atomic<bool>> cancelled;
    tensorflow::CancellationToken token = tensorflow::CancellationManager::kInvalidToken;
  };

  // A row of a batch: an actor, and the epoch that identifies its process.
  struct Ticket {
    int32_t actor;
    int64_t epoch;
  };

  UnrollBatcher(void* segment, UnrollSpec spec, const UnrollBatcherOptions& options,
                const std::vector<int32_t>& level_ids);

  void GatherLoop();
  void DequeueLoop();

  void AddWaiter(Waiter waiter, std::deque<Waiter>* waiters);
  void Finish(Waiter waiter, const absl::Status& status);
  // Finishes cancelled waiters that no loop has taken yet.
  void FinishCancelled(std::deque<Waiter>* waiters);
  void NotifyLoops();

  // Selects the actors of the next batch. Returns none while too few rows wait; `num_missing` is
  // then the number of further requests to wait for.
  std::vector<Ticket> SelectActors(bool timed_out, int* num_missing);
  bool IsReady(int actor) const;
  void LookForNonFinite(int actor);
  void ResetLocked(int actor);
  // Returns whether too many unrolls were discarded in a row.
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
  std::vector<size_t> output_bytes_, state_bytes_;  // Per row.

  // Guards everything down to the timers. Held while actors are selected and results are written
  // back (a few kilobytes per actor), never while frames are copied into a batch.
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
