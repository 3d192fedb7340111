// Connects the learner's eager runtime with the sessions of actor jobs on other machines.
//
// TensorFlow's server runs its clients' graphs in the learner's process, but with separate
// resources: they cannot access anything that the eager runtime made. The two objects below belong
// to the process instead, and both sides look them up by name. Tensors pass through them by
// reference.

#ifndef IMPALA_CLUSTER_CC_EXCHANGE_H_
#define IMPALA_CLUSTER_CC_EXCHANGE_H_

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace impala {

// The spec of one array of an unroll.
struct UnrollArray {
  std::string name;
  tensorflow::DataType type;
  tensorflow::TensorShape shape;  // Of one unroll.
  bool time_major;                // Its first dimension is time and stays the first in batches.
  int64_t low, high;              // Bounds of integers, inclusive.
};

// The actor and client that put an unroll, and the unroll's sequence number.
struct Sender {
  int32_t actor;
  std::string host, level;
  std::string notes;  // Further information; stored without being interpreted.
  int64_t client, sequence;
};

// Reserves an actor number for one client.
struct Reservation {
  int64_t client;
  std::string host;
  uint64_t since, until;  // In nanoseconds of the monotonic clock.
};

struct ActorStatistics {
  std::string host, level, notes;
  int64_t accepted = 0, rejected = 0, duplicates = 0;
  int64_t last_version = -1;  // Policy version of its last unroll.
  uint64_t last_seen = 0;     // In nanoseconds of the monotonic clock.
  std::string last_rejection;
};

struct InboxStatistics {
  std::map<int32_t, ActorStatistics> actors;
  int64_t queued, waiting;  // Unrolls in the queue, and unrolls that wait for room in it.
  double copy_seconds;
};

// A bounded FIFO queue of unrolls. Each unroll enters complete, valid and only once.
class UnrollInbox : public std::enable_shared_from_this<UnrollInbox> {
 public:
  using Done = std::function<void()>;

  UnrollInbox(std::string name, int capacity, std::vector<UnrollArray> components,
              int version_component);

  // Puts one unroll. `done` is called as soon as the unroll is in the queue, or is found to be a
  // duplicate: the client has already put one with this sequence number or a later one. Output 0 of
  // `context` is false for duplicates. An invalid unroll fails with InvalidArgument.
  void Put(tensorflow::OpKernelContext* context, Sender sender,
           std::vector<tensorflow::Tensor> unroll, Done done);

  // Takes the next `batch_size` unrolls. The outputs of `context` are the actors, then the
  // components. A cancelled call loses the unrolls that it has already taken.
  void Take(tensorflow::OpKernelContext* context, int batch_size, Done done);

  // From now on, unrolls with policy versions up to this one are valid.
  void SetLatestVersion(int64_t version) { latest_version_ = version; }

  // Reserves `actor` for `client` for `seconds` from now, or releases it if `seconds` is 0, unless
  // another client has reserved it. `holder` is set to the reservation that holds then, or to the
  // one that was released.
  absl::Status Reserve(int32_t actor, int64_t client, std::string host, double seconds,
                       Reservation* holder);

  InboxStatistics GetStatistics();

  // Fails all waiting calls. May be called at any time, repeatedly.
  void Close();
  bool IsClosed();

 private:
  struct Unroll {
    int32_t actor;
    std::vector<tensorflow::Tensor> components;
  };

  // A pending op, which ends with `done`. The inbox's mutex guards `cancelled`.
  struct Waiter {
    tensorflow::OpKernelContext* context;
    Done done;
    tensorflow::CancellationToken token = tensorflow::CancellationManager::kInvalidToken;
    bool cancelled = false;
  };

  struct PendingPut : Waiter {
    Sender sender;
    int64_t version;
    Unroll unroll;
    bool is_duplicate = false;
  };

  struct PendingTake : Waiter {
    int batch_size;
    tensorflow::Tensor actors;
    std::vector<tensorflow::Tensor> components;
    int num_claimed = 0;             // Columns with an assigned unroll. Guarded by the mutex.
    std::atomic<int> num_copied{0};  // Columns that have been written.
  };

  // An unroll that is to be copied into a column of a batch.
  struct Claim {
    std::shared_ptr<PendingTake> take;
    int column;
    Unroll unroll;
  };

  absl::Status Check(const Sender& sender, const std::vector<tensorflow::Tensor>& unroll) const;
  absl::Status Allocate(PendingTake* take) const;
  void CopyUnroll(const Claim& claim) const;

  // Queues a waiter, unless it is cancelled or the inbox is closed, and moves unrolls.
  template <typename Pending>
  void Enter(std::shared_ptr<Pending> waiter, std::deque<std::shared_ptr<Pending>>* waiters);
  static void Finish(Waiter* waiter, const absl::Status& status);
  // Moves unrolls from waiting puts into the queue, and from the queue into batches.
  void Move();
  absl::Status ClosedStatus() const;

  const std::string name_;
  const int capacity_;
  const std::vector<UnrollArray> components_;
  const int version_component_;
  std::atomic<int64_t> latest_version_{0};
  std::atomic<uint64_t> copy_nanoseconds_{0};

  // Guards everything below. Never held while unrolls are checked or copied.
  std::mutex mutex_;
  bool closed_ = false;
  std::deque<Unroll> queue_;
  std::deque<std::shared_ptr<PendingPut>> puts_;
  std::deque<std::shared_ptr<PendingTake>> takes_;  // Those with columns without unrolls.
  std::unordered_map<int64_t, int64_t> last_sequence_;  // Last accepted, by client.
  std::map<int32_t, ActorStatistics> actors_;
  std::unordered_map<int32_t, Reservation> reservations_;
};

// What the learner publishes for actors: fixed settings and the latest weights.
class WeightsBoard {
 public:
  WeightsBoard(std::string name, std::string settings)
      : name_(std::move(name)), settings_(std::move(settings)) {}

  // Keeps references to the weights. Their owner must not write to shared buffers; TensorFlow's
  // variables do not.
  void Publish(int64_t version, std::vector<tensorflow::Tensor> weights);
  // Tells readers that the present version is final.
  void Finish();
  // Returns the latest version, -1 before the first.
  absl::Status ReadVersion(int64_t* version, bool* finished);
  absl::Status ReadWeights(int64_t* version, std::vector<tensorflow::Tensor>* weights);
  const std::string& settings() const { return settings_; }

  void Close();
  bool IsClosed();

 private:
  const std::string name_, settings_;

  std::mutex mutex_;
  bool closed_ = false, finished_ = false;
  int64_t version_ = -1;
  std::vector<tensorflow::Tensor> weights_;
};

// The objects of this process by name. A closed object stays until a new one takes its name, so
// that callers learn that it is closed.
template <typename T>
class Registry {
 public:
  static Registry* Get() {
    static auto* registry = new Registry();
    return registry;
  }

  absl::Status Add(const std::string& name, std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<T>& place = objects_[name];
    if (place != nullptr && !place->IsClosed()) {
      return absl::AlreadyExistsError(absl::StrCat("'", name, "' exists already"));
    }
    place = std::move(object);
    return absl::OkStatus();
  }

  absl::Status Find(const std::string& name, std::shared_ptr<T>* object) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(name);
    if (found == objects_.end()) {
      return absl::NotFoundError(absl::StrCat("'", name, "' does not exist"));
    }
    *object = found->second;
    return absl::OkStatus();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<T>> objects_;
};

}  // namespace impala

#endif  // IMPALA_CLUSTER_CC_EXCHANGE_H_
