// Where the learner's eager side meets the sessions of actor jobs on other machines.
//
// TensorFlow's server runs the graphs of its clients in the learner's process, but with resources
// of their own: nothing that the eager runtime made can be found from there. These two objects
// belong to the process instead and are found by name from either side. Tensors pass through them
// by reference.

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

// What all unrolls have in the same place.
struct UnrollArray {
  std::string name;
  tensorflow::DataType type;
  tensorflow::TensorShape shape;  // Of one unroll.
  bool time_major;                // Its first dimension is time and stays the first in batches.
  int64_t low, high;              // Of integers, inclusive.
};

// Who puts an unroll, and which of its unrolls it is.
struct Sender {
  int32_t actor;
  std::string host, level;
  std::string notes;  // What it tells of itself; kept, not looked at.
  int64_t client, sequence;
};

// Who sends as an actor, so that no two do.
struct Reservation {
  int64_t client;
  std::string host;
  uint64_t since, until;  // In nanoseconds of the monotonic clock.
};

struct ActorStatistics {
  std::string host, level, notes;
  int64_t accepted = 0, rejected = 0, duplicates = 0;
  int64_t last_version = -1;  // Of the weights behind its last unroll.
  uint64_t last_seen = 0;     // In nanoseconds of the monotonic clock.
  std::string last_rejection;
};

struct InboxStatistics {
  std::map<int32_t, ActorStatistics> actors;
  int64_t queued, waiting;  // Unrolls in the queue and before it.
  double copy_seconds;
};

// A bounded queue of unrolls, first in, first out, that come whole, valid and once.
class UnrollInbox : public std::enable_shared_from_this<UnrollInbox> {
 public:
  using Done = std::function<void()>;

  UnrollInbox(std::string name, int capacity, std::vector<UnrollArray> components,
              int version_component);

  // Puts one unroll. `done` is called as soon as it is in the queue, or was there already under
  // this sequence number or a later one of this client: output 0 of `context` tells the two apart.
  // An unroll that is not as it must be fails with InvalidArgument.
  void Put(tensorflow::OpKernelContext* context, Sender sender,
           std::vector<tensorflow::Tensor> unroll, Done done);

  // Asks for the next `batch_size` unrolls. The outputs of `context` are the actors, then the
  // components. A cancelled call loses the unrolls that it already had.
  void Take(tensorflow::OpKernelContext* context, int batch_size, Done done);

  // From now on unrolls of weights up to this version are valid.
  void SetLatestVersion(int64_t version) { latest_version_ = version; }

  // Has `client` be the one that sends as `actor` for so many seconds from now, 0 to end that, unless
  // another client is. `holder` is whose reservation there is then, or was until now.
  absl::Status Reserve(int32_t actor, int64_t client, std::string host, double seconds,
                       Reservation* holder);

  InboxStatistics GetStatistics();

  // Fails whoever waits. Safe to call at any time, repeatedly.
  void Close();
  bool IsClosed();

 private:
  struct Unroll {
    int32_t actor;
    std::vector<tensorflow::Tensor> components;
  };

  // An op that waits for `done`. `cancelled` is guarded by the inbox's mutex.
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
    int num_claimed = 0;             // Columns that have their unroll. Guarded by the mutex.
    std::atomic<int> num_copied{0};  // Columns that are there.
  };

  // An unroll on its way into its column of a batch.
  struct Claim {
    std::shared_ptr<PendingTake> take;
    int column;
    Unroll unroll;
  };

  absl::Status Check(const Sender& sender, const std::vector<tensorflow::Tensor>& unroll) const;
  absl::Status Allocate(PendingTake* take) const;
  void CopyUnroll(const Claim& claim) const;

  // Queues a waiter, unless it is cancelled or the inbox closed, and moves what can be moved.
  template <typename Pending>
  void Enter(std::shared_ptr<Pending> waiter, std::deque<std::shared_ptr<Pending>>* waiters);
  static void Finish(Waiter* waiter, const absl::Status& status);
  // Moves unrolls from those who wait into the queue and from there into batches.
  void Move();
  absl::Status ClosedStatus() const;

  const std::string name_;
  const int capacity_;
  const std::vector<UnrollArray> components_;
  const int version_component_;
  std::atomic<int64_t> latest_version_{0};
  std::atomic<uint64_t> copy_nanoseconds_{0};

  // Guards everything below. Never held while unrolls are looked through or copied.
  std::mutex mutex_;
  bool closed_ = false;
  std::deque<Unroll> queue_;
  std::deque<std::shared_ptr<PendingPut>> puts_;
  std::deque<std::shared_ptr<PendingTake>> takes_;  // That have columns without unrolls.
  std::unordered_map<int64_t, int64_t> last_sequence_;  // Accepted last, of each client.
  std::map<int32_t, ActorStatistics> actors_;
  std::unordered_map<int32_t, Reservation> reservations_;
};

// What the learner lets actors know: settings, once, and weights, of which only the latest count.
class WeightsBoard {
 public:
  WeightsBoard(std::string name, std::string settings)
      : name_(std::move(name)), settings_(std::move(settings)) {}

  // Keeps references. Whoever owns the weights must not write to buffers that are shared;
  // TensorFlow's variables do not.
  void Publish(int64_t version, std::vector<tensorflow::Tensor> weights);
  // Tells readers that there will be no more.
  void Finish();
  // The last version, -1 while there is none.
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

// The objects of this process by name. One that is closed stays, so that those who ask for it hear
// of that, until another takes its place.
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
