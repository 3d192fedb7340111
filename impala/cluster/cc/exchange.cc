#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <limits>

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
// Rough cost of copying a byte, in the cycles that tensorflow::Shard() uses.
constexpr double kCyclesPerByte = 0.25;

absl::Status CancelledStatus() { return absl::CancelledError("the caller was cancelled"); }

TensorShape BatchShape(const UnrollArray& component, int batch_size) {
  TensorShape shape = component.shape;
  shape.InsertDim(component.time_major ? 1 : 0, batch_size);
  return shape;
}

// Returns whether all exponents differ from `exponent`, that of infinities and NaNs. Works on bits,
// because compilers vectorize that loop.
template <typename Bits>
bool AllFinite(const Tensor& tensor, Bits exponent) {
  const Bits* values = static_cast<const Bits*>(tensor.data());
  const int64_t size = tensor.NumElements();
  Bits found = 0;
  for (int64_t i = 0; i < size; ++i) found |= (values[i] & exponent) == exponent;
  return found == 0;
}

template <typename T>
absl::Status CheckRange(const UnrollArray& component, const Tensor& tensor, int64_t high) {
  if (component.low <= std::numeric_limits<T>::min() && high >= std::numeric_limits<T>::max()) {
    return absl::OkStatus();
  }
  const T* values = static_cast<const T*>(tensor.data());
  for (int64_t i = 0; i < tensor.NumElements(); ++i) {
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
absl::Status CheckValues(const UnrollArray& component, const Tensor& tensor, int64_t high) {
  bool is_finite = true;
  switch (component.type) {
    case tensorflow::DT_FLOAT:
      is_finite = AllFinite<uint32_t>(tensor, 0x7f800000);
      break;
    case tensorflow::DT_DOUBLE:
      is_finite = AllFinite<uint64_t>(tensor, 0x7ff0000000000000);
      break;
    case tensorflow::DT_HALF:
      is_finite = AllFinite<uint16_t>(tensor, 0x7c00);
      break;
    case tensorflow::DT_BFLOAT16:
      is_finite = AllFinite<uint16_t>(tensor, 0x7f80);
      break;
    case tensorflow::DT_INT8:
      return CheckRange<int8_t>(component, tensor, high);
    case tensorflow::DT_UINT8:
      return CheckRange<uint8_t>(component, tensor, high);
    case tensorflow::DT_INT16:
      return CheckRange<int16_t>(component, tensor, high);
    case tensorflow::DT_UINT16:
      return CheckRange<uint16_t>(component, tensor, high);
    case tensorflow::DT_INT32:
      return CheckRange<int32_t>(component, tensor, high);
    case tensorflow::DT_UINT32:
      return CheckRange<uint32_t>(component, tensor, high);
    case tensorflow::DT_INT64:
      return CheckRange<int64_t>(component, tensor, high);
    case tensorflow::DT_BOOL: {
      // A byte from the network may be neither, which is undefined behaviour for its users.
      const uint8_t* values = static_cast<const uint8_t*>(tensor.data());
      for (int64_t i = 0; i < tensor.NumElements(); ++i) {
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

UnrollInbox::UnrollInbox(std::string name, int capacity, std::vector<UnrollArray> components,
                         int version_component)
    : name_(std::move(name)),
      capacity_(capacity),
      components_(std::move(components)),
      version_component_(version_component) {}

absl::Status UnrollInbox::ClosedStatus() const {
  return absl::CancelledError(absl::StrCat("the inbox '", name_, "' is closed"));
}

absl::Status UnrollInbox::Check(const Sender& sender, const std::vector<Tensor>& unroll) const {
  if (sender.actor < 0) return absl::InvalidArgumentError("the number of an actor is not negative");
  if (sender.host.size() > kLongestName || sender.level.size() > kLongestName) {
    return absl::InvalidArgumentError("the name of a host or level is too long");
  }
  if (sender.notes.size() > kLongestNotes) {
    return absl::InvalidArgumentError("the notes of an actor are too long");
  }
  if (unroll.size() != components_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("it has ", unroll.size(), " components, not ",
                                                   components_.size()));
  }
  for (size_t i = 0; i < components_.size(); ++i) {
    const UnrollArray& component = components_[i];
    if (unroll[i].dtype() != component.type || unroll[i].shape() != component.shape) {
      return absl::InvalidArgumentError(absl::StrCat(
          "component '", component.name, "' is ", DataTypeString(unroll[i].dtype()),
          unroll[i].shape().DebugString(), ", not ", DataTypeString(component.type),
          component.shape.DebugString()));
    }
    TF_RETURN_IF_ERROR(CheckValues(
        component, unroll[i], i == version_component_ ? latest_version_.load() : component.high));
  }
  return absl::OkStatus();
}

void UnrollInbox::Put(OpKernelContext* context, Sender sender, std::vector<Tensor> unroll,
                      Done done) {
  if (absl::Status status = Check(sender, unroll); !status.ok()) {
    // No statistics for a negative number, which no actor has.
    if (sender.actor >= 0) {
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
  put->version = unroll[version_component_].scalar<int64_t>()();
  put->unroll = {sender.actor, std::move(unroll)};
  put->sender = std::move(sender);
  Enter(std::move(put), &puts_);
}

void UnrollInbox::Take(OpKernelContext* context, int batch_size, Done done) {
  auto take = std::make_shared<PendingTake>();
  take->context = context;
  take->done = std::move(done);
  take->batch_size = batch_size;
  const absl::Status status =
      context->num_outputs() == components_.size() + 1
          ? Allocate(take.get())
          : absl::InvalidArgumentError(absl::StrCat("'", name_, "' has other components"));
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
    int64_t bytes = 0;
    for (const Tensor& component : claims[0].unroll.components) bytes += component.TotalBytes();
    tensorflow::Shard(pool->NumThreads(), pool, claims.size(), bytes * kCyclesPerByte,
                      [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) {
                          CopyUnroll(claims[i]);
                          claims[i].unroll.components.clear();
                        }
                      });
  }
  copy_nanoseconds_ += NowNanoseconds() - started_at;
  for (Claim& claim : claims) {
    claim.unroll.components.clear();
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
  for (size_t i = 0; i < components_.size(); ++i) {
    const Tensor& source = claim.unroll.components[i];
    const int64_t rows = components_[i].time_major ? components_[i].shape.dim_size(0) : 1;
    if (source.NumElements() == 0) continue;
    const size_t bytes = source.TotalBytes() / rows;
    const char* from = static_cast<const char*>(source.data());
    char* to = static_cast<char*>(take.components[i].data()) + claim.column * bytes;
    for (int64_t row = 0; row < rows; ++row) {
      memcpy(to + row * take.batch_size * bytes, from + row * bytes, bytes);
    }
  }
}

absl::Status UnrollInbox::Reserve(int32_t actor, int64_t client, std::string host, double seconds,
                                  Reservation* holder) {
  if (actor < 0) return absl::InvalidArgumentError("the number of an actor is not negative");
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
  if (found != reservations_.end() && found->second.client != client &&
      now < found->second.until) {
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

bool UnrollInbox::IsClosed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

void WeightsBoard::Publish(int64_t version, std::vector<Tensor> weights) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  version_ = version;
  // The caller's vector frees the old weights after the lock is released.
  weights_.swap(weights);
}

void WeightsBoard::Finish() {
  std::lock_guard<std::mutex> lock(mutex_);
  finished_ = true;
}

absl::Status WeightsBoard::ReadVersion(int64_t* version, bool* finished) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return absl::CancelledError(absl::StrCat("the board '", name_, "' is closed"));
  *version = version_;
  *finished = finished_;
  return absl::OkStatus();
}

absl::Status WeightsBoard::ReadWeights(int64_t* version, std::vector<Tensor>* weights) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return absl::CancelledError(absl::StrCat("the board '", name_, "' is closed"));
  if (version_ < 0) {
    return absl::NotFoundError(absl::StrCat("there are no weights on the board '", name_, "' yet"));
  }
  *version = version_;
  *weights = weights_;
  return absl::OkStatus();
}

void WeightsBoard::Close() {
  std::vector<Tensor> weights;
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  weights_.swap(weights);
}

bool WeightsBoard::IsClosed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

}  // namespace impala
