#include "unroll_batcher.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

#include "recycling_allocator.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/errors.h"

namespace dynamic_batching {
namespace {

using tensorflow::DataType;
using tensorflow::DataTypeSize;
using tensorflow::OpInputList;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// Bounds each wait, because a process that is killed in the middle of its request may never send
// its wake-up.
constexpr uint64_t kLongestWaitNanoseconds = 200000000;
// Offset from the present value of the doorbell that no request reaches.
constexpr uint32_t kNever = 1u << 30;

absl::Status CancelledStatus() { return absl::CancelledError("the caller was cancelled"); }
absl::Status ClosedStatus() { return absl::CancelledError("the batcher is closed"); }

size_t RowBytes(DataType type, const TensorShape& shape) {
  return DataTypeSize(type) * shape.num_elements();
}

char* Data(Tensor* tensor) { return static_cast<char*>(tensor->data()); }
const char* Data(const Tensor& tensor) { return static_cast<const char*>(tensor.data()); }

TensorShape WithLeading(std::initializer_list<int64_t> leading, const TensorShape& shape) {
  TensorShape result;
  for (int64_t size : leading) result.AddDim(size);
  result.AppendShape(shape);
  return result;
}

}  // namespace

absl::Status UnrollBatcher::Create(int fd, UnrollSpec spec, const UnrollBatcherOptions& options,
                                   std::vector<int32_t> level_ids,
                                   std::shared_ptr<UnrollBatcher>* batcher) {
  SegmentHeader header = {};
  header.num_actors = level_ids.size();
  header.num_unrolls = options.num_unrolls;
  header.rows = options.rows;
  header.num_fields = spec.input_types.size();
  if (spec.input_types.size() > kMaxFields || spec.input_types.size() <= kFirstObservation) {
    return absl::InvalidArgumentError(
        absl::StrCat("a row has ", kFirstObservation, " fixed fields and 1 to ",
                     kMaxFields - kFirstObservation, " observations"));
  }
  if (options.num_unrolls <= static_cast<int>(level_ids.size()) || options.rows < 2) {
    return absl::InvalidArgumentError(
        "there must be more unrolls than actors, and at least two rows in each");
  }
  if (options.minimum_batch_size < 1 || options.maximum_batch_size < options.minimum_batch_size) {
    return absl::InvalidArgumentError("1 <= minimum_batch_size <= maximum_batch_size must hold");
  }
  for (int i = 0; i < header.num_fields; ++i) {
    header.fields[i].row_bytes = RowBytes(spec.input_types[i], spec.input_shapes[i]);
  }
  if (spec.output_types.empty()) {
    return absl::InvalidArgumentError("the first output must be the action");
  }
  const bool is_scalar =
      spec.output_types[0] == tensorflow::DT_INT32 && spec.output_shapes[0].dims() == 0;
  header.action_bytes = is_scalar ? 0 : RowBytes(spec.output_types[0], spec.output_shapes[0]);
  ComputeLayout(&header);
  if (ftruncate(fd, header.segment_bytes) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot make ", header.segment_bytes,
                                                     " bytes of shared memory: ", strerror(errno)));
  }
  void* segment =
      mmap(nullptr, header.segment_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, /*offset=*/0);
  if (segment == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot map ", header.segment_bytes,
                                                     " bytes of shared memory: ", strerror(errno)));
  }
  auto* shared_header = static_cast<SegmentHeader*>(segment);
  memcpy(static_cast<void*>(shared_header), &header, offsetof(SegmentHeader, doorbell));
  shared_header->wake_at.store(kNever);
  try {
    batcher->reset(new UnrollBatcher(segment, std::move(spec), options, level_ids));
  } catch (const std::bad_alloc&) {
    munmap(segment, header.segment_bytes);
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate the outputs of ", options.num_unrolls, " unrolls"));
  }
  // Written last: a client that finds the magic number finds everything else in place.
  shared_header->magic = kSegmentMagic;
  // The loops keep the batcher alive and end when it is closed. Detached, since one of them may
  // drop the last reference, and a thread cannot join itself.
  std::thread([self = *batcher] { self->GatherLoop(); }).detach();
  std::thread([self = *batcher] { self->DequeueLoop(); }).detach();
  return absl::OkStatus();
}

UnrollBatcher::UnrollBatcher(void* segment, UnrollSpec spec, const UnrollBatcherOptions& options,
                             const std::vector<int32_t>& level_ids)
    : segment_(segment),
      header_(static_cast<SegmentHeader*>(segment)),
      spec_(std::move(spec)),
      options_(options),
      actors_(level_ids.size()),
      unrolls_(options.num_unrolls) {
  for (size_t i = 0; i < spec_.output_types.size(); ++i) {
    output_bytes_.push_back(RowBytes(spec_.output_types[i], spec_.output_shapes[i]));
  }
  for (size_t i = 0; i < spec_.state_types.size(); ++i) {
    state_bytes_.push_back(RowBytes(spec_.state_types[i], spec_.state_shapes[i]));
  }
  for (Unroll& unroll : unrolls_) {
    for (size_t bytes : output_bytes_) unroll.outputs.emplace_back(bytes * options_.rows, '\0');
    for (size_t bytes : state_bytes_) unroll.states.emplace_back(bytes, '\0');
  }
  for (int i = 0; i < actors_.size(); ++i) {
    actors_[i].unroll = i;
    actors_[i].level_id = level_ids[i];
    for (size_t bytes : state_bytes_) actors_[i].states.emplace_back(bytes, '\0');
    unrolls_[i].actor = i;
    unrolls_[i].level_id = level_ids[i];
    ActorBlock* block = GetActorBlock(segment_, i);
    block->unroll = i;
    block->row = 0;
  }
  for (int i = actors_.size(); i < options_.num_unrolls; ++i) free_unrolls_.push_back(i);
}

UnrollBatcher::~UnrollBatcher() { munmap(segment_, header_->segment_bytes); }

void UnrollBatcher::AddWaiter(Waiter waiter, std::deque<Waiter>* waiters) {
  waiter.since = NowNanoseconds();
  waiter.cancelled = std::make_shared<std::atomic<bool>>(false);
  if (auto* manager = waiter.context->cancellation_manager(); manager != nullptr) {
    waiter.token = manager->get_cancellation_token();
    const bool registered = manager->RegisterCallback(
        waiter.token, [self = shared_from_this(), cancelled = waiter.cancelled, waiters] {
          cancelled->store(true);
          self->FinishCancelled(waiters);
          self->NotifyLoops();
        });
    if (!registered) waiter.cancelled->store(true);
  }
  {
    std::unique_lock<std::mutex> lock(mutex_);
    // A cancellation after this check finds the waiter in its queue.
    if (!IsClosed() && !waiter.cancelled->load()) {
      waiters->push_back(std::move(waiter));
      inputs_wanted_.notify_one();
      unrolls_changed_.notify_one();
      return;
    }
  }
  const absl::Status status = IsClosed() ? ClosedStatus() : CancelledStatus();
  Finish(std::move(waiter), status);
}

void UnrollBatcher::Finish(Waiter waiter, const absl::Status& status) {
  if (waiter.token != tensorflow::CancellationManager::kInvalidToken) {
    waiter.context->cancellation_manager()->DeregisterCallback(waiter.token);
  }
  if (!status.ok()) waiter.context->SetStatus(status);
  waiter.done();
}

void UnrollBatcher::FinishCancelled(std::deque<Waiter>* waiters) {
  std::vector<Waiter> cancelled;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto waiter = waiters->begin(); waiter != waiters->end();) {
      if (waiter->cancelled->load()) {
        cancelled.push_back(std::move(*waiter));
        waiter = waiters->erase(waiter);
      } else {
        ++waiter;
      }
    }
  }
  for (Waiter& waiter : cancelled) {
    // This runs inside the cancellation, for which Finish() would wait.
    waiter.context->SetStatus(CancelledStatus());
    waiter.done();
  }
}

void UnrollBatcher::NotifyLoops() {
  // Locking ensures that no loop is between its check and its wait.
  { std::lock_guard<std::mutex> lock(mutex_); }
  inputs_wanted_.notify_all();
  unrolls_changed_.notify_all();
  header_->doorbell.fetch_add(1);
  FutexWake(&header_->doorbell);
}

bool UnrollBatcher::IsReady(int actor) const {
  if (actors_[actor].in_batch) return false;
  const uint32_t state = GetActorBlock(segment_, actor)->state.load(std::memory_order_acquire);
  return state == kRequested || state == kSleeping;
}

std::vector<UnrollBatcher::Ticket> UnrollBatcher::SelectActors(bool timed_out, int* num_missing) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int> ready;
  for (int actor = 0; actor < actors_.size(); ++actor) {
    if (!IsReady(actor)) continue;
    if (actors_[actor].arrival == 0) actors_[actor].arrival = ++arrivals_;
    ready.push_back(actor);
  }
  // First come, first served: no actor starves when more of them wait than fit into a batch or, as
  // is usual when the learner is the bottleneck, into the queue.
  std::sort(ready.begin(), ready.end(),
            [this](int a, int b) { return actors_[a].arrival < actors_[b].arrival; });
  std::vector<Ticket> selected;
  int64_t num_silent = 0;
  for (int actor = 0; actor < actors_.size(); ++actor) {
    num_silent += GetActorBlock(segment_, actor)->finished.load();
  }
  for (int actor : ready) {
    LookForNonFinite(actor);
    if (actors_[actor].row == options_.rows - 1) {
      // Its unroll is full: the actor waits until there is room for another one, unless the full
      // one is discarded and reused.
      if (free_unrolls_.empty() && !unrolls_[actors_[actor].unroll].is_spoiled) {
        if (!GetActorBlock(segment_, actor)->finished.load()) ++num_silent;
        continue;
      }
      // Even if no batch starts now: the learner may be waiting for the full unroll.
      StartNextUnroll(actor);
    }
    if (selected.size() < options_.maximum_batch_size) {
      selected.push_back({actor, actors_[actor].epoch});
    }
  }
  // Actors that have finished or wait for the learner send no requests, so the minimum shrinks with
  // the number of the others.
  const int64_t num_actors = actors_.size();
  const int minimum = std::max<int64_t>(
      1, options_.minimum_batch_size * (num_actors - num_silent) / num_actors);
  *num_missing = timed_out ? 1 : minimum - static_cast<int>(selected.size());
  if (selected.size() < minimum && (selected.empty() || !timed_out)) return {};
  for (const Ticket& ticket : selected) {
    Actor& actor = actors_[ticket.actor];
    actor.in_batch = true;
    actor.arrival = 0;
    if (actor.row == 0) unrolls_[actor.unroll].states = actor.states;
  }
  return selected;
}

// Checks the row that an actor has requested. Idempotent: it may run again while the row waits.
void UnrollBatcher::LookForNonFinite(int actor) {
  const ActorBlock* block = GetActorBlock(segment_, actor);
  if (block->non_finite == 0) return;
  unrolls_[actors_[actor].unroll].is_spoiled = true;
  counts_.non_finite_actor = actor;
  counts_.non_finite = block->non_finite;
  counts_.non_finite_value = block->non_finite_value;
}

bool UnrollBatcher::IsHopeless() {
  std::lock_guard<std::mutex> lock(mutex_);
  return options_.max_discarded_in_a_row > 0 &&
         counts_.discarded_in_a_row >= options_.max_discarded_in_a_row;
}

void UnrollBatcher::StartNextUnroll(int actor_id) {
  Actor& actor = actors_[actor_id];
  const int full = actor.unroll;
  const bool is_discarded = unrolls_[full].is_spoiled;
  int next = full;
  if (!is_discarded) {
    next = free_unrolls_.back();
    free_unrolls_.pop_back();
  }
  const int last_row = options_.rows - 1;
  for (int field = 0; field < header_->num_fields; ++field) {
    memcpy(GetRow(segment_, next, field, 0), GetRow(segment_, full, field, last_row),
           header_->fields[field].row_bytes);
  }
  for (size_t i = 0; i < output_bytes_.size(); ++i) {
    memcpy(&unrolls_[next].outputs[i][0], &unrolls_[full].outputs[i][last_row * output_bytes_[i]],
           output_bytes_[i]);
  }
  unrolls_[next].actor = actor_id;
  unrolls_[next].level_id = actor.level_id;
  // Row 0 of the next unroll is the last row of the full one.
  unrolls_[next].is_spoiled = GetActorBlock(segment_, actor_id)->non_finite != 0;
  actor.unroll = next;
  actor.row = 0;
  ++actor.completed_unrolls;
  actor.policy_version = unrolls_[full].policy_version;
  if (is_discarded) {
    ++counts_.discarded;
    // While the queue is full, good unrolls wait and only spoiled ones get here: do not count them.
    if (!free_unrolls_.empty()) ++counts_.discarded_in_a_row;
    return;
  }
  ++counts_.queued;
  counts_.discarded_in_a_row = 0;
  full_unrolls_.push_back(full);
  unrolls_changed_.notify_one();
}

void UnrollBatcher::GetInputs(OpKernelContext* context, Done done) {
  AddWaiter({context, std::move(done)}, &input_waiters_);
}

void UnrollBatcher::GatherLoop() {
  while (true) {
    Waiter waiter;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      inputs_wanted_.wait(lock, [this] { return IsClosed() || !input_waiters_.empty(); });
      if (input_waiters_.empty()) return;
      waiter = std::move(input_waiters_.front());
      input_waiters_.pop_front();
    }
    std::vector<Ticket> tickets;
    while (true) {
      // Any event after this read (a request, closing, a cancellation) makes the wait return at
      // once, so all conditions must be checked after it.
      const uint32_t requests = header_->doorbell.load();
      if (IsClosed() || waiter.cancelled->load()) break;
      const uint64_t waited = NowNanoseconds() - waiter.since;
      const bool timed_out = waited >= options_.timeout_nanoseconds;
      int num_missing;
      tickets = SelectActors(timed_out, &num_missing);
      if (IsHopeless()) {
        Close();
        tickets.clear();
        break;
      }
      if (!tickets.empty()) break;
      // Requests after this store see `wake_at`.
      header_->wake_at.store(requests + num_missing);
      FutexWait(&header_->doorbell, requests,
                std::min(kLongestWaitNanoseconds,
                         timed_out ? kLongestWaitNanoseconds
                                   : options_.timeout_nanoseconds - waited));
      header_->wake_at.store(requests + kNever);
    }
    const uint64_t selected_at = NowNanoseconds();
    request_wait_ += selected_at - waiter.since;
    absl::Status status;
    if (tickets.empty()) {
      status = IsClosed() ? ClosedStatus() : CancelledStatus();
    } else {
      status = FillBatch(waiter.context, tickets);
      ++batches_;
      rows_ += tickets.size();
      gathered_at_ = NowNanoseconds();
      gather_ += gathered_at_ - selected_at;
    }
    Finish(std::move(waiter), status);
  }
}

absl::Status UnrollBatcher::FillBatch(OpKernelContext* context,
                                      const std::vector<Ticket>& tickets) {
  const int64_t batch_size = tickets.size();
  int output = 0;
  tensorflow::Allocator* const allocator = BatchAllocator(context);
  const auto allocate = [&](DataType type, const TensorShape& shape, Tensor* tensor) {
    // The allocator reuses the memory although the shape changes from batch to batch.
    *tensor = Tensor(allocator, type, WithLeading({batch_size}, shape));
    if (!tensor->IsInitialized()) return absl::ResourceExhaustedError("out of memory for a batch");
    context->set_output(output++, *tensor);
    return absl::OkStatus();
  };
  Tensor ids, epochs, last_action;
  TF_RETURN_IF_ERROR(allocate(tensorflow::DT_INT32, {}, &ids));
  TF_RETURN_IF_ERROR(allocate(tensorflow::DT_INT64, {}, &epochs));
  std::vector<Tensor> inputs(spec_.input_types.size()), states(spec_.state_types.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    TF_RETURN_IF_ERROR(allocate(spec_.input_types[i], spec_.input_shapes[i], &inputs[i]));
  }
  TF_RETURN_IF_ERROR(allocate(spec_.output_types[0], spec_.output_shapes[0], &last_action));
  for (size_t i = 0; i < states.size(); ++i) {
    TF_RETURN_IF_ERROR(allocate(spec_.state_types[i], spec_.state_shapes[i], &states[i]));
  }

  std::vector<std::pair<int, int>> rows;  // Unroll and row of each actor's inputs.
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int i = 0; i < batch_size; ++i) {
      const Actor& actor = actors_[tickets[i].actor];
      rows.emplace_back(actor.unroll, actor.row);
      ids.flat<int32_t>()(i) = tickets[i].actor;
      // Not the actor's present epoch: if the actor was reset since, this ticket must not answer
      // the process that replaced it.
      epochs.flat<int64_t>()(i) = tickets[i].epoch;
      memcpy(Data(&last_action) + i * output_bytes_[0],
             &unrolls_[actor.unroll].outputs[0][actor.row * output_bytes_[0]], output_bytes_[0]);
      for (size_t j = 0; j < states.size(); ++j) {
        memcpy(Data(&states[j]) + i * state_bytes_[j], actor.states[j].data(), state_bytes_[j]);
      }
    }
  }
  for (size_t field = 0; field < inputs.size(); ++field) {
    const size_t bytes = header_->fields[field].row_bytes;
    for (int i = 0; i < batch_size; ++i) {
      memcpy(Data(&inputs[field]) + i * bytes,
             GetRow(segment_, rows[i].first, field, rows[i].second), bytes);
    }
  }
  return absl::OkStatus();
}

absl::Status UnrollBatcher::SetOutputs(const Tensor& actor_ids, const Tensor& epochs,
                                       int64_t policy_version, const OpInputList& outputs,
                                       const OpInputList& states) {
  const uint64_t started_at = NowNanoseconds();
  inference_ += started_at - gathered_at_;
  const int64_t batch_size = actor_ids.NumElements();
  const auto check = [&](const Tensor& tensor, DataType type, const TensorShape& shape,
                         const char* what, int index) {
    if (tensor.dtype() == type && tensor.shape() == WithLeading({batch_size}, shape)) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat(
        what, " ", index, " of the agent is ", DataTypeString(tensor.dtype()),
        tensor.shape().DebugString(), ", its spec says ", DataTypeString(type),
        WithLeading({batch_size}, shape).DebugString()));
  };
  if (actor_ids.dims() != 1 || epochs.shape() != actor_ids.shape()) {
    return absl::InvalidArgumentError("tickets are two vectors of the same length");
  }
  if (outputs.size() != output_bytes_.size() || states.size() != state_bytes_.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the agent has ", outputs.size(), " outputs and ", states.size(), " states, its spec says ",
        output_bytes_.size(), " and ", state_bytes_.size()));
  }
  for (int i = 0; i < outputs.size(); ++i) {
    TF_RETURN_IF_ERROR(
        check(outputs[i], spec_.output_types[i], spec_.output_shapes[i], "output", i));
  }
  for (int i = 0; i < states.size(); ++i) {
    TF_RETURN_IF_ERROR(check(states[i], spec_.state_types[i], spec_.state_shapes[i], "state", i));
  }
  for (int64_t i = 0; i < batch_size; ++i) {
    const int id = actor_ids.flat<int32_t>()(i);
    if (id < 0 || id >= actors_.size()) {
      return absl::InvalidArgumentError(absl::StrCat("there is no actor ", id));
    }
  }
  std::vector<ActorBlock*> sleepers;
  sleepers.reserve(batch_size);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 0; i < batch_size; ++i) {
      const int id = actor_ids.flat<int32_t>()(i);
      Actor& actor = actors_[id];
      if (actor.epoch != epochs.flat<int64_t>()(i) || !actor.in_batch) continue;
      Unroll& unroll = unrolls_[actor.unroll];
      if (actor.row == 0) unroll.policy_version = policy_version;
      ++actor.row;
      for (int j = 0; j < outputs.size(); ++j) {
        memcpy(&unroll.outputs[j][actor.row * output_bytes_[j]],
               Data(outputs[j]) + i * output_bytes_[j], output_bytes_[j]);
      }
      for (int j = 0; j < states.size(); ++j) {
        memcpy(&actor.states[j][0], Data(states[j]) + i * state_bytes_[j], state_bytes_[j]);
      }
      actor.in_batch = false;
      ActorBlock* block = GetActorBlock(segment_, id);
      block->unroll = actor.unroll;
      block->row = actor.row;
      if (header_->action_bytes == 0) {
        block->action = outputs[0].flat<int32_t>()(i);
      } else {
        memcpy(GetAction(segment_, id), Data(outputs[0]) + i * output_bytes_[0], output_bytes_[0]);
      }
      if (block->state.exchange(kAnswered) == kSleeping) sleepers.push_back(block);
    }
  }
  for (ActorBlock* block : sleepers) FutexWake(&block->state);
  scatter_ += NowNanoseconds() - started_at;
  return absl::OkStatus();
}

void UnrollBatcher::Dequeue(OpKernelContext* context, int batch_size, int num_inputs, Done done) {
  AddWaiter({context, std::move(done), batch_size, num_inputs}, &dequeue_waiters_);
}

void UnrollBatcher::DequeueLoop() {
  while (true) {
    Waiter waiter;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      unrolls_changed_.wait(lock, [this] { return IsClosed() || !dequeue_waiters_.empty(); });
      if (dequeue_waiters_.empty()) return;
      waiter = std::move(dequeue_waiters_.front());
      dequeue_waiters_.pop_front();
    }
    std::vector<Tensor> batch;
    absl::Status status = AllocateBatch(waiter, &batch);
    for (int column = 0; status.ok() && column < waiter.batch_size; ++column) {
      const uint64_t started_at = NowNanoseconds();
      int unroll;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        unrolls_changed_.wait(lock, [&] {
          return IsClosed() || waiter.cancelled->load() || !full_unrolls_.empty();
        });
        if (IsClosed() || waiter.cancelled->load()) {
          status = IsClosed() ? ClosedStatus() : CancelledStatus();
          break;
        }
        unroll = full_unrolls_.front();
        full_unrolls_.pop_front();
      }
      const uint64_t copied_from = NowNanoseconds();
      queue_wait_ += copied_from - started_at;
      CopyUnroll(unroll, column, waiter, &batch);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        free_unrolls_.push_back(unroll);
      }
      // Actors with a full unroll sent their requests before there was room for them.
      header_->doorbell.fetch_add(1);
      FutexWake(&header_->doorbell);
      queue_copy_ += NowNanoseconds() - copied_from;
    }
    if (status.ok()) {
      for (size_t i = 0; i < batch.size(); ++i) waiter.context->set_output(i, batch[i]);
    }
    batch.clear();
    Finish(std::move(waiter), status);
  }
}

absl::Status UnrollBatcher::AllocateBatch(const Waiter& waiter, std::vector<Tensor>* batch) const {
  const int batch_size = waiter.batch_size;
  tensorflow::Allocator* const allocator = BatchAllocator(waiter.context);
  const auto add = [&](DataType type, const TensorShape& shape) {
    batch->emplace_back(allocator, type, shape);
    return batch->back().IsInitialized()
               ? absl::OkStatus()
               : absl::ResourceExhaustedError("out of memory for a batch of unrolls");
  };
  TF_RETURN_IF_ERROR(add(tensorflow::DT_INT32, {batch_size}));  // Level ids.
  TF_RETURN_IF_ERROR(add(tensorflow::DT_INT32, {batch_size}));  // Actors.
  TF_RETURN_IF_ERROR(add(tensorflow::DT_INT64, {batch_size}));  // Policy versions.
  for (size_t i = 0; i < spec_.state_types.size(); ++i) {
    TF_RETURN_IF_ERROR(
        add(spec_.state_types[i], WithLeading({batch_size}, spec_.state_shapes[i])));
  }
  for (int i = 0; i < waiter.num_inputs; ++i) {
    TF_RETURN_IF_ERROR(add(spec_.input_types[i],
                           WithLeading({options_.rows, batch_size}, spec_.input_shapes[i])));
  }
  for (size_t i = 0; i < spec_.output_types.size(); ++i) {
    TF_RETURN_IF_ERROR(add(spec_.output_types[i],
                           WithLeading({options_.rows, batch_size}, spec_.output_shapes[i])));
  }
  return absl::OkStatus();
}

// Reads a full unroll without the lock, since no other thread uses it.
void UnrollBatcher::CopyUnroll(int index, int column, const Waiter& waiter,
                               std::vector<Tensor>* batch) {
  const Unroll& unroll = unrolls_[index];
  auto tensor = batch->begin();
  (tensor++)->flat<int32_t>()(column) = unroll.level_id;
  (tensor++)->flat<int32_t>()(column) = unroll.actor;
  (tensor++)->flat<int64_t>()(column) = unroll.policy_version;
  for (size_t i = 0; i < state_bytes_.size(); ++i) {
    memcpy(Data(&*tensor++) + column * state_bytes_[i], unroll.states[i].data(), state_bytes_[i]);
  }
  const auto copy_rows = [&](const char* source, size_t bytes) {
    char* target = Data(&*tensor++) + column * bytes;
    for (int row = 0; row < options_.rows; ++row) {
      memcpy(target + row * waiter.batch_size * bytes, source + row * bytes, bytes);
    }
  };
  for (int field = 0; field < waiter.num_inputs; ++field) {
    copy_rows(GetRow(segment_, index, field, 0), header_->fields[field].row_bytes);
  }
  for (size_t i = 0; i < output_bytes_.size(); ++i) {
    copy_rows(unroll.outputs[i].data(), output_bytes_[i]);
  }
}

absl::Status UnrollBatcher::ResetActor(int id) {
  if (id < 0 || id >= actors_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("there is no actor ", id));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  ResetLocked(id);
  return absl::OkStatus();
}

absl::Status UnrollBatcher::AssignActor(int id, int32_t level_id) {
  if (id < 0 || id >= actors_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("there is no actor ", id));
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    actors_[id].level_id = level_id;
    ResetLocked(id);
    GetActorBlock(segment_, id)->finished.store(1);
  }
  // The next batch may have been waiting for it.
  header_->doorbell.fetch_add(1);
  FutexWake(&header_->doorbell);
  return absl::OkStatus();
}

void UnrollBatcher::ResetLocked(int id) {
  Actor& actor = actors_[id];
  ++actor.epoch;
  actor.row = 0;
  actor.in_batch = false;
  actor.arrival = 0;
  actor.completed_unrolls = 0;
  actor.policy_version = -1;
  Unroll& unroll = unrolls_[actor.unroll];
  unroll.level_id = actor.level_id;
  unroll.is_spoiled = false;
  for (std::string& state : actor.states) std::fill(state.begin(), state.end(), '\0');
  for (size_t i = 0; i < output_bytes_.size(); ++i) {
    std::fill_n(unroll.outputs[i].begin(), output_bytes_[i], '\0');
  }
  ActorBlock* block = GetActorBlock(segment_, id);
  block->unroll = actor.unroll;
  block->row = 0;
  block->finished.store(0);
  block->non_finite = 0;
  block->state.store(kIdle);
}

void UnrollBatcher::Close() {
  header_->closed.store(1);
  NotifyLoops();
  for (int i = 0; i < actors_.size(); ++i) {
    // Changing the state also keeps an actor that is about to sleep from doing so.
    ActorBlock* block = GetActorBlock(segment_, i);
    uint32_t state = kSleeping;
    if (block->state.compare_exchange_strong(state, kRequested)) FutexWake(&block->state);
  }
}

std::vector<int64_t> UnrollBatcher::CompletedUnrolls() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> completed;
  for (const Actor& actor : actors_) completed.push_back(actor.completed_unrolls);
  return completed;
}

std::vector<int64_t> UnrollBatcher::PolicyVersions() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> versions;
  for (const Actor& actor : actors_) versions.push_back(actor.policy_version);
  return versions;
}

std::vector<UnrollBatcher::Activity> UnrollBatcher::Activities() const {
  std::vector<Activity> activities;
  for (int i = 0; i < actors_.size(); ++i) {
    const ActorBlock* block = GetActorBlock(segment_, i);
    const uint64_t nanoseconds = block->environment_nanoseconds.load(std::memory_order_relaxed) +
                                 block->waiting_nanoseconds.load(std::memory_order_relaxed);
    activities.push_back({static_cast<RequestState>(block->state.load()),
                          static_cast<int64_t>(nanoseconds)});
  }
  return activities;
}

UnrollCounts UnrollBatcher::Counts() {
  std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

std::vector<double> UnrollBatcher::StageSeconds() const {
  uint64_t environment = 0, wait = 0;
  for (int i = 0; i < actors_.size(); ++i) {
    const ActorBlock* block = GetActorBlock(segment_, i);
    environment += block->environment_nanoseconds.load(std::memory_order_relaxed);
    wait += block->waiting_nanoseconds.load(std::memory_order_relaxed);
  }
  std::vector<double> seconds;
  for (uint64_t nanoseconds : {environment, wait, request_wait_.load(), gather_.load(),
                               inference_.load(), scatter_.load(), queue_wait_.load(),
                               queue_copy_.load()}) {
    seconds.push_back(nanoseconds * 1e-9);
  }
  return seconds;
}

}  // namespace dynamic_batching
