// The learner's inbox of unrolls from actor jobs. An unroll is copied once, into its batch.

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
  std::string host, level;
  std::string notes;  // Further information; stored without being interpreted.
  int64_t actor, client, sequence;
};

// How the arrays of an unroll lie in its buffer; see impala/cluster/unroll_format.py.
struct UnrollForm {
  std::vector<UnrollArray> arrays;
  std::vector<int64_t> offsets;  // Of each array, in bytes.
  int64_t num_bytes;             // Of the buffer.
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

  // `stack` is the component that stacks frames, uint8 [T+1, ..., C]; -1 if none does.
  UnrollInbox(int capacity, std::vector<UnrollArray> components, int version_component, int stack);

  // Puts one unroll, uint8 [N], and keeps a reference to it. `done` is called as soon as the unroll
  // is in the queue, or is found to be a duplicate: the client has already put one with this
  // sequence number or a later one. Output 0 of `context` is false for duplicates. An invalid
  // unroll fails with InvalidArgument.
  void Put(tensorflow::OpKernelContext* context, Sender sender, tensorflow::Tensor buffer,
           Done done);

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

 private:
  struct Unroll {
    int32_t actor;
    const UnrollForm* form;
    tensorflow::Tensor buffer;

    const void* array(int i) const {
      return static_cast<const char*>(buffer.data()) + form->offsets[i];
    }
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

  static absl::Status Check(const Sender& sender);
  // Sets the form of an unroll by its buffer, which may be anything.
  absl::Status FindForm(Unroll* unroll) const;
  absl::Status Check(const Unroll& unroll) const;
  absl::Status Allocate(PendingTake* take) const;
  void CopyUnroll(const Claim& claim) const;

  // Queues a waiter, unless it is cancelled or the inbox is closed, and moves unrolls.
  template <typename Pending>
  void Enter(std::shared_ptr<Pending> waiter, std::deque<std::shared_ptr<Pending>>* waiters);
  static void Finish(Waiter* waiter, const absl::Status& status);
  // Moves unrolls from waiting puts into the queue, and from the queue into batches.
  void Move();

  const int capacity_;
  const std::vector<UnrollArray> components_;
  const int version_component_, stack_;
  std::vector<UnrollForm> forms_;  // Plain and, if there is a stack, packed.
  std::atomic<int64_t> latest_version_{0};
  std::atomic<uint64_t> copy_nanoseconds_{0};

  // Guards everything below. Never held while unrolls are checked or copied.
  std::mutex mutex_;
  bool closed_ = false;
  std::deque<Unroll> queue_;
  std::deque<std::shared_ptr<PendingPut>> puts_;
  std::deque<std::shared_ptr<PendingTake>> takes_;      // Those with columns without unrolls.
  std::unordered_map<int64_t, int64_t> last_sequence_;  // Last accepted, by client.
  std::map<int32_t, ActorStatistics> actors_;
  std::unordered_map<int32_t, Reservation> reservations_;
};

}  // namespace impala

#endif  // IMPALA_CLUSTER_CC_EXCHANGE_H_
