#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "dynamic_batching/cc/clock.h"
#include "dynamic_batching/cc/recycling_allocator.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/threadpool.h"
#include "tensorflow/core/util/work_sharder.h"

namespace impala {
namespace {

using dynamic_batching::BatchAllocator;
using dynamic_batching::NowNanoseconds;
using tensorflow::DataType;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// Limits of the names and notes that are kept for each actor; clients choose them.
constexpr size_t kLongestName = 256;
constexpr size_t kLongestNotes = 4096;
// A longer reservation would, in effect, block its actor number forever if the client dies.
constexpr double kLongestReservationSeconds = 3600;
// Each array of an unroll begins at a multiple of these bytes.
constexpr int64_t kAlignment = 64;
// Rough cost of copying a byte, in the cycles that tensorflow::Shard() uses.
constexpr double kCyclesPerByte = 0.25;

absl::Status CancelledStatus() { return absl::CancelledError("the caller was cancelled"); }
absl::Status ClosedStatus() { return absl::CancelledError("the inbox is closed"); }

absl::Status CheckActor(int64_t number) {
  if (number >= 0 && number <= std::numeric_limits<int32_t>::max()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("an actor cannot have the number ", number));
}

TensorShape BatchShape(const UnrollArray& component, int batch_size) {
  TensorShape shape = component.shape;
  shape.InsertDim(component.time_major ? 1 : 0, batch_size);
  return shape;
}

int64_t NumBytes(const UnrollArray& array) {
  return array.shape.num_elements() * tensorflow::DataTypeSize(array.type);
}

UnrollForm FormOf(std::vector<UnrollArray> arrays) {
  UnrollForm form;
  // After the number of the form.
  int64_t end = 1;
  for (const UnrollArray& array : arrays) {
    const int64_t offset = (end + kAlignment - 1) / kAlignment * kAlignment;
    form.offsets.push_back(offset);
    end = offset + NumBytes(array);
  }
  form.arrays = std::move(arrays);
  form.num_bytes = end;
  return form;
}

// Returns the arrays of an unroll whose component `stack`, [T+1, ..., C], is packed: as frames
// [T+C, ...], and last of all, for each row, whether an episode begins with it.
std::vector<UnrollArray> Packed(std::vector<UnrollArray> arrays, int stack) {
  TensorShape& shape = arrays[stack].shape;
  const int64_t rows = shape.dim_size(0);
  const int64_t size = shape.dim_size(shape.dims() - 1);
  shape.RemoveLastDims(1);
  shape.set_dim(0, rows + size - 1);
  arrays.push_back({absl::StrCat(arrays[stack].name, "_begins"), tensorflow::DT_BOOL,
                    TensorShape({rows}), /*time_major=*/false, /*low=*/0, /*high=*/0});
  return arrays;
}

// Writes frames, each of `length` bytes, into a row of stacks [length, size].
template <int size>
void Interleave(const uint8_t* const* frames, int64_t length, uint8_t* __restrict row) {
  const uint8_t* sources[size];
  std::copy_n(frames, size, sources);
  for (int64_t i = 0; i < length; ++i) {
    for (int k = 0; k < size; ++k) row[i * size + k] = sources[k][i];
  }
}

void Interleave(const uint8_t* const* frames, int size, int64_t length, uint8_t* __restrict row) {
  // Compilers vectorize this one; Atari has such stacks.
  if (size == 4) return Interleave<4>(frames, length, row);
  for (int k = 0; k < size; ++k) {
    for (int64_t i = 0; i < length; ++i) row[i * size + k] = frames[k][i];
  }
}

// Rebuilds stacks of `shape`, [T+1, ..., C], from frames [T+C, ...]. Row t is in `stacks` from byte
// t * stride. `begins` says with which rows an episode begins.
void RebuildStacks(const uint8_t* frames, const bool* begins, const TensorShape& shape,
                   int64_t stride, uint8_t* stacks) {
  const int64_t rows = shape.dim_size(0);
  const int64_t size = shape.dim_size(shape.dims() - 1);
  const int64_t length = shape.num_elements() / rows / size;
  std::vector<const uint8_t*> sources(size);
  int64_t first = 0;  // Older frames do not belong to the row's episode.
  for (int64_t row = 0; row < rows; ++row) {
    if (begins[row]) first = row + size - 1;
    for (int64_t k = 0; k < size; ++k) sources[k] = frames + std::max(row + k, first) * length;
    Interleave(sources.data(), size, length, stacks + row * stride);
  }
}

// Returns whether all exponents differ from `exponent`, that of infinities and NaNs. Works on bits,
// because compilers vectorize that loop.
template <typename Bits>
bool AllFinite(const void* array, int64_t size, Bits exponent) {
  const Bits* values = static_cast<const Bits*>(array);
  Bits found = 0;
  for (int64_t i = 0; i < size; ++i) found |= (values[i] & exponent) == exponent;
  return found == 0;
}

template <typename T>
absl::Status CheckRange(const UnrollArray& component, const void* array, int64_t size,
                        int64_t high) {
  if (component.low <= std::numeric_limits<T>::min() && high >= std::numeric_limits<T>::max()) {
    return absl::OkStatus();
  }
  const T* values = static_cast<const T*>(array);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t value = values[i];
    if (value < component.low || value > high) {
      return absl::InvalidArgumentError(absl::StrCat("component '", component.name, "' holds ",
                                                     value, ", which is not in [", component.low,
                                                     ", ", high, "]"));
    }
  }
  return absl::OkStatus();
}

// Checks the values of an array; `high` replaces the upper bound of its spec.
absl::Status CheckValues(const UnrollArray& component, const void* array, int64_t high) {
  const int64_t size = component.shape.num_elements();
  bool is_finite = true;
  switch (component.type) {
    case tensorflow::DT_FLOAT:
      is_finite = AllFinite<uint32_t>(array, size, 0x7f800000);
      break;
    case tensorflow::DT_DOUBLE:
      is_finite = AllFinite<uint64_t>(array, size, 0x7ff0000000000000);
      break;
    case tensorflow::DT_HALF:
      is_finite = AllFinite<uint16_t>(array, size, 0x7c00);
      break;
    case tensorflow::DT_BFLOAT16:
      is_finite = AllFinite<uint16_t>(array, size, 0x7f80);
      break;
    case tensorflow::DT_INT8:
      return CheckRange<int8_t>(component, array, size, high);
    case tensorflow::DT_UINT8:
      return CheckRange<uint8_t>(component, array, size, high);
    case tensorflow::DT_INT16:
      return CheckRange<int16_t>(component, array, size, high);
    case tensorflow::DT_UINT16:
      return CheckRange<uint16_t>(component, array, size, high);
    case tensorflow::DT_INT32:
      return CheckRange<int32_t>(component, array, size, high);
    case tensorflow::DT_UINT32:
      return CheckRange<uint32_t>(component, array, size, high);
    case tensorflow::DT_INT64:
      return CheckRange<int64_t>(component, array, size, high);
    case tensorflow::DT_BOOL: {
      // A byte from the network may be neither, which is undefined behaviour for its users.
      const uint8_t* values = static_cast<const uint8_t*>(array);
      for (int64_t i = 0; i < size; ++i) {
        if (values[i] > 1) {
          return absl::InvalidArgumentError(
              absl::StrCat("component '", component.name, "' holds neither true nor false"));
        }
      }
      break;
    }
    default:
      return absl::InvalidArgumentError(absl::StrCat("component '", component.name,
                                                     "' cannot be of type ",
                                                     DataTypeString(component.type)));
  }
  if (is_finite) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("component '", component.name, "' holds a value that is not finite"));
}

}  // namespace

UnrollInbox::UnrollInbox(int capacity, std::vector<UnrollArray> components, int version_component,
                         int stack)
    : capacity_(capacity),
      components_(std::move(components)),
      version_component_(version_component),
      stack_(stack) {
  forms_.push_back(FormOf(components_));
  if (stack_ >= 0) forms_.push_back(FormOf(Packed(components_, stack_)));
}

absl::Status UnrollInbox::Check(const Sender& sender) {
  TF_RETURN_IF_ERROR(CheckActor(sender.actor));
  if (sender.host.size() > kLongestName || sender.level.size() > kLongestName) {
    return absl::InvalidArgumentError("the name of a host or level is too long");
  }
  if (sender.notes.size() > kLongestNotes) {
    return absl::InvalidArgumentError("the notes of an actor are too long");
  }
  return absl::OkStatus();
}

absl::Status UnrollInbox::FindForm(Unroll* unroll) const {
  const int64_t size = unroll->buffer.NumElements();
  const int number = size == 0 ? 0 : *static_cast<const uint8_t*>(unroll->buffer.data());
  if (number >= forms_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("it is of form ", number, ", which is not in [0, ", forms_.size() - 1, "]"));
  }
  unroll->form = &forms_[number];
  if (size != unroll->form->num_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("it has ", size, " bytes, not ", unroll->form->num_bytes));
  }
  return absl::OkStatus();
}

absl::Status UnrollInbox::Check(const Unroll& unroll) const {
  const std::vector<UnrollArray>& arrays = unroll.form->arrays;
  for (size_t i = 0; i < arrays.size(); ++i) {
    TF_RETURN_IF_ERROR(
        CheckValues(arrays[i], unroll.array(i),
                    i == version_component_ ? latest_version_.load() : arrays[i].high));
  }
  return absl::OkStatus();
}

void UnrollInbox::Put(OpKernelContext* context, Sender sender, Tensor buffer, Done done) {
  Unroll unroll{static_cast<int32_t>(sender.actor), nullptr, std::move(buffer)};
  absl::Status status = Check(sender);
  if (status.ok()) status = FindForm(&unroll);
  if (status.ok()) status = Check(unroll);
  if (!status.ok()) {
    // No statistics for numbers that no actor has.
    if (CheckActor(sender.actor).ok()) {
      std::lock_guard<std::mutex> lock(mutex_);
      ActorStatistics& actor = actors_[sender.actor];
      if (actor.host.empty()) actor.host = sender.host.substr(0, kLongestName);
      ++actor.rejected;
      actor.last_seen = NowNanoseconds();
      actor.last_rejection = std::string(status.message());
    }
    context->SetStatus(absl::InvalidArgumentError(absl::StrCat(
        "unroll of actor ", sender.actor, " refused: ", status.message())));
    done();
    return;
  }
  auto put = std::make_shared<PendingPut>();
  put->context = context;
  put->done = std::move(done);
  put->version = *static_cast<const int64_t*>(unroll.array(version_component_));
  put->unroll = std::move(unroll);
  put->sender = std::move(sender);
  Enter(std::move(put), &puts_);
}

void UnrollInbox::Take(OpKernelContext* context, int batch_size, Done done) {
  auto take = std::make_shared<PendingTake>();
  take->context = context;
  take->done = std::move(done);
  take->batch_size = batch_size;
  const absl::Status status = context->num_outputs() == components_.size() + 1
                                  ? Allocate(take.get())
                                  : absl::InvalidArgumentError("the inbox has other components");
  if (!status.ok()) {
    Finish(take.get(), status);
    return;
  }
  Enter(std::move(take), &takes_);
}

absl::Status UnrollInbox::Allocate(PendingTake* take) const {
  tensorflow::Allocator* const allocator = BatchAllocator(take->context);
  const auto allocate = [allocator](DataType type, const TensorShape& shape, Tensor* tensor) {
    *tensor = Tensor(allocator, type, shape);
    return tensor->IsInitialized()
               ? absl::OkStatus()
               : absl::ResourceExhaustedError("out of memory for a batch of unrolls");
  };
  TF_RETURN_IF_ERROR(allocate(tensorflow::DT_INT32, {take->batch_size}, &take->actors));
  take->components.resize(components_.size());
  for (size_t i = 0; i < components_.size(); ++i) {
    TF_RETURN_IF_ERROR(allocate(components_[i].type, BatchShape(components_[i], take->batch_size),
                                &take->components[i]));
  }
  return absl::OkStatus();
}

template <typename Pending>
void UnrollInbox::Enter(std::shared_ptr<Pending> waiter,
                        std::deque<std::shared_ptr<Pending>>* waiters) {
  if (auto* manager = waiter->context->cancellation_manager(); manager != nullptr) {
    waiter->token = manager->get_cancellation_token();
    const bool registered =
        manager->RegisterCallback(waiter->token, [self = shared_from_this(), waiter, waiters] {
          {
            std::lock_guard<std::mutex> lock(self->mutex_);
            waiter->cancelled = true;
            const auto found = std::find(waiters->begin(), waiters->end(), waiter);
            // Not queued yet, or another thread is about to finish it.
            if (found == waiters->end()) return;
            waiters->erase(found);
          }
          // Finish() would wait for this very callback.
          waiter->context->SetStatus(CancelledStatus());
          waiter->done();
        });
    if (!registered) {
      waiter->token = tensorflow::CancellationManager::kInvalidToken;
      Finish(waiter.get(), CancelledStatus());
      return;
    }
  }
  absl::Status status;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      status = ClosedStatus();
    } else if (waiter->cancelled) {
      status = CancelledStatus();
    } else {
      waiters->push_back(waiter);
    }
  }
  if (!status.ok()) {
    Finish(waiter.get(), status);
    return;
  }
  Move();
}

void UnrollInbox::Finish(Waiter* waiter, const absl::Status& status) {
  if (waiter->token != tensorflow::CancellationManager::kInvalidToken) {
    waiter->context->cancellation_manager()->DeregisterCallback(waiter->token);
  }
  if (!status.ok()) waiter->context->SetStatus(status);
  // Moved out, since `done` may drop the last reference to the waiter.
  Done done = std::move(waiter->done);
  done();
}

void UnrollInbox::Move() {
  std::vector<std::shared_ptr<PendingPut>> settled;
  std::vector<Claim> claims;
  tensorflow::thread::ThreadPool* pool = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    while (true) {
      if (!takes_.empty() && !queue_.empty()) {
        std::shared_ptr<PendingTake> take = takes_.front();
        // Looked up while the take is still pending, because its context ends with it.
        pool = take->context->device()->tensorflow_cpu_worker_threads()->workers;
        const int column = take->num_claimed++;
        if (take->num_claimed == take->batch_size) takes_.pop_front();
        claims.push_back({std::move(take), column, std::move(queue_.front())});
        queue_.pop_front();
        continue;
      }
      if (puts_.empty()) break;
      PendingPut& put = *puts_.front();
      const auto last = last_sequence_.find(put.sender.client);
      ActorStatistics& actor = actors_[put.sender.actor];
      actor.host = put.sender.host;
      actor.level = put.sender.level;
      actor.notes = put.sender.notes;
      actor.last_seen = NowNanoseconds();
      if (last != last_sequence_.end() && put.sender.sequence <= last->second) {
        put.is_duplicate = true;
        ++actor.duplicates;
      } else if (queue_.size() < capacity_) {
        last_sequence_[put.sender.client] = put.sender.sequence;
        ++actor.accepted;
        actor.last_version = put.version;
        queue_.push_back(std::move(put.unroll));
      } else {
        break;
      }
      settled.push_back(std::move(puts_.front()));
      puts_.pop_front();
    }
  }
  // Finish the puts first, so that actors continue while their unrolls are copied.
  for (const std::shared_ptr<PendingPut>& put : settled) {
    Tensor accepted(tensorflow::DT_BOOL, {});
    accepted.scalar<bool>()() = !put->is_duplicate;
    put->context->set_output(0, accepted);
    Finish(put.get(), absl::OkStatus());
  }
  settled.clear();
  if (claims.empty()) return;
  const uint64_t started_at = NowNanoseconds();
  if (claims.size() == 1) {
    CopyUnroll(claims[0]);
  } else {
    tensorflow::Shard(pool->NumThreads(), pool, claims.size(), forms_[0].num_bytes * kCyclesPerByte,
                      [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) {
                          CopyUnroll(claims[i]);
                          claims[i].unroll.buffer = Tensor();
                        }
                      });
  }
  copy_nanoseconds_ += NowNanoseconds() - started_at;
  for (Claim& claim : claims) {
    claim.unroll.buffer = Tensor();
    PendingTake& take = *claim.take;
    // The thread that copies the last column finishes the batch. A cancelled batch never fills up.
    if (take.num_copied.fetch_add(1) + 1 < take.batch_size) continue;
    take.context->set_output(0, take.actors);
    for (size_t i = 0; i < take.components.size(); ++i) {
      take.context->set_output(i + 1, take.components[i]);
    }
    // Drop our references, so that the receiver may reuse the buffers.
    take.actors = Tensor();
    take.components.clear();
    Finish(&take, absl::OkStatus());
  }
}

void UnrollInbox::CopyUnroll(const Claim& claim) const {
  PendingTake& take = *claim.take;
  take.actors.flat<int32_t>()(claim.column) = claim.unroll.actor;
  const bool is_packed = claim.unroll.form != &forms_[0];
  for (int i = 0; i < components_.size(); ++i) {
    const UnrollArray& component = components_[i];
    const int64_t rows = component.time_major ? component.shape.dim_size(0) : 1;
    const int64_t bytes = NumBytes(component) / rows;
    if (bytes == 0) continue;
    const char* from = static_cast<const char*>(claim.unroll.array(i));
    char* to = static_cast<char*>(take.components[i].data()) + claim.column * bytes;
    const int64_t stride = take.batch_size * bytes;
    if (is_packed && i == stack_) {
      const void* begins = claim.unroll.array(components_.size());
      RebuildStacks(reinterpret_cast<const uint8_t*>(from), static_cast<const bool*>(begins),
                    component.shape, stride, reinterpret_cast<uint8_t*>(to));
      continue;
    }
    for (int64_t row = 0; row < rows; ++row) memcpy(to + row * stride, from + row * bytes, bytes);
  }
}

absl::Status UnrollInbox::Reserve(int32_t actor, int64_t client, std::string host, double seconds,
                                  Reservation* holder) {
  TF_RETURN_IF_ERROR(CheckActor(actor));
  if (host.size() > kLongestName) {
    return absl::InvalidArgumentError("the name of a host is too long");
  }
  if (!(seconds >= 0 && seconds <= kLongestReservationSeconds)) {
    return absl::InvalidArgumentError("a number cannot be reserved for so long");
  }
  const uint64_t now = NowNanoseconds();
  *holder = {client, std::move(host), now, now + static_cast<uint64_t>(seconds * 1e9)};
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return ClosedStatus();
  const auto found = reservations_.find(actor);
  if (found != reservations_.end() && found->second.client != client && now < found->second.until) {
    *holder = found->second;
  } else if (seconds > 0) {
    reservations_[actor] = *holder;
  } else {
    reservations_.erase(actor);
  }
  return absl::OkStatus();
}

InboxStatistics UnrollInbox::GetStatistics() {
  std::lock_guard<std::mutex> lock(mutex_);
  // An actor that waits for room in the queue counts as seen now.
  for (const auto& put : puts_) actors_[put->sender.actor].last_seen = NowNanoseconds();
  return {actors_, static_cast<int64_t>(queue_.size()), static_cast<int64_t>(puts_.size()),
          copy_nanoseconds_.load() * 1e-9};
}

void UnrollInbox::Close() {
  std::deque<std::shared_ptr<PendingPut>> puts;
  std::deque<std::shared_ptr<PendingTake>> takes;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    puts.swap(puts_);
    takes.swap(takes_);
    queue_.clear();
  }
  for (const auto& put : puts) Finish(put.get(), ClosedStatus());
  for (const auto& take : takes) Finish(take.get(), ClosedStatus());
}

}  // namespace impala
