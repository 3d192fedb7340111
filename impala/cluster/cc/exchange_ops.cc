// TensorFlow ops of the unroll inbox and the weights board; see exchange.h.

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dynamic_batching/cc/clock.h"
#include "exchange.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace impala {
namespace {

using dynamic_batching::NowNanoseconds;
using tensorflow::AsyncOpKernel;
using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::tstring;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// Looks its object up in each call, since a new object may have taken the name.
template <typename T, typename Base>
class NamedOp : public Base {
 public:
  explicit NamedOp(OpKernelConstruction* context) : Base(context) {
    OP_REQUIRES_OK(context, context->GetAttr("object", &object_));
  }

 protected:
  absl::Status Find(std::shared_ptr<T>* object) const {
    return Registry<T>::Get()->Find(object_, object);
  }
  const std::string& object_name() const { return object_; }

 private:
  std::string object_;
};

using InboxOp = NamedOp<UnrollInbox, OpKernel>;
using AsyncInboxOp = NamedOp<UnrollInbox, AsyncOpKernel>;
using BoardOp = NamedOp<WeightsBoard, OpKernel>;

// The inputs come from other machines, so their shapes must be checked.
absl::Status RequireScalars(OpKernelContext* context, int num_inputs) {
  for (int i = 0; i < num_inputs; ++i) {
    if (context->input(i).dims() != 0) {
      return absl::InvalidArgumentError(absl::StrCat("input ", i, " must be a scalar"));
    }
  }
  return absl::OkStatus();
}

class UnrollInboxOp : public InboxOp {
 public:
  explicit UnrollInboxOp(OpKernelConstruction* context) : InboxOp(context) {
    std::vector<std::string> names;
    std::vector<tensorflow::DataType> types;
    std::vector<TensorShape> shapes;
    std::vector<bool> time_major;
    std::vector<int64_t> lows, highs;
    OP_REQUIRES_OK(context, context->GetAttr("names", &names));
    OP_REQUIRES_OK(context, context->GetAttr("types", &types));
    OP_REQUIRES_OK(context, context->GetAttr("shapes", &shapes));
    OP_REQUIRES_OK(context, context->GetAttr("time_major", &time_major));
    OP_REQUIRES_OK(context, context->GetAttr("lows", &lows));
    OP_REQUIRES_OK(context, context->GetAttr("highs", &highs));
    OP_REQUIRES_OK(context, context->GetAttr("version_component", &version_component_));
    OP_REQUIRES_OK(context, context->GetAttr("capacity", &capacity_));
    const size_t size = names.size();
    OP_REQUIRES(context,
                types.size() == size && shapes.size() == size && time_major.size() == size &&
                    lows.size() == size && highs.size() == size,
                absl::InvalidArgumentError("the lists must be of the same length"));
    for (size_t i = 0; i < size; ++i) {
      OP_REQUIRES(context, tensorflow::DataTypeCanUseMemcpy(types[i]),
                  absl::InvalidArgumentError(absl::StrCat("component '", names[i],
                                                          "' cannot be of type ",
                                                          DataTypeString(types[i]))));
      OP_REQUIRES(context, !time_major[i] || (shapes[i].dims() > 0 && shapes[i].dim_size(0) > 0),
                  absl::InvalidArgumentError(
                      absl::StrCat("component '", names[i], "' has no dimension for time")));
      components_.push_back({names[i], types[i], shapes[i], time_major[i], lows[i], highs[i]});
    }
    OP_REQUIRES(context,
                version_component_ >= 0 && version_component_ < size &&
                    types[version_component_] == tensorflow::DT_INT64 &&
                    shapes[version_component_].dims() == 0,
                absl::InvalidArgumentError("the policy version must be an int64 scalar"));
  }

  void Compute(OpKernelContext* context) override {
    OP_REQUIRES_OK(context, Registry<UnrollInbox>::Get()->Add(
                                object_name(),
                                std::make_shared<UnrollInbox>(object_name(), capacity_, components_,
                                                              version_component_)));
  }

 private:
  std::vector<UnrollArray> components_;
  int capacity_, version_component_;
};

class UnrollInboxPutOp : public AsyncInboxOp {
 public:
  using AsyncInboxOp::AsyncInboxOp;

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::shared_ptr<UnrollInbox> inbox;
    OP_REQUIRES_OK_ASYNC(context, Find(&inbox), done);
    OP_REQUIRES_OK_ASYNC(context, RequireScalars(context, 6), done);
    OpInputList components;
    OP_REQUIRES_OK_ASYNC(context, context->input_list("unroll", &components), done);
    Sender sender;
    sender.actor = context->input(0).scalar<int32_t>()();
    sender.host = context->input(1).scalar<tstring>()();
    sender.level = context->input(2).scalar<tstring>()();
    sender.notes = context->input(3).scalar<tstring>()();
    sender.client = context->input(4).scalar<int64_t>()();
    sender.sequence = context->input(5).scalar<int64_t>()();
    inbox->Put(context, std::move(sender), {components.begin(), components.end()},
               std::move(done));
  }
};

class UnrollInboxTakeOp : public AsyncInboxOp {
 public:
  explicit UnrollInboxTakeOp(OpKernelConstruction* context) : AsyncInboxOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("batch_size", &batch_size_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::shared_ptr<UnrollInbox> inbox;
    OP_REQUIRES_OK_ASYNC(context, Find(&inbox), done);
    inbox->Take(context, batch_size_, std::move(done));
  }

 private:
  int batch_size_;
};

class UnrollInboxReserveOp : public InboxOp {
 public:
  using InboxOp::InboxOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollInbox> inbox;
    OP_REQUIRES_OK(context, Find(&inbox));
    OP_REQUIRES_OK(context, RequireScalars(context, 4));
    const int64_t client = context->input(1).scalar<int64_t>()();
    Reservation holder;
    OP_REQUIRES_OK(context, inbox->Reserve(context->input(0).scalar<int32_t>()(), client,
                                           context->input(2).scalar<tstring>()(),
                                           context->input(3).scalar<double>()(), &holder));
    Tensor *is_own, *host, *seconds;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &is_own));
    OP_REQUIRES_OK(context, context->allocate_output(1, {}, &host));
    OP_REQUIRES_OK(context, context->allocate_output(2, {}, &seconds));
    is_own->scalar<bool>()() = holder.client == client;
    host->scalar<tstring>()() = holder.host;
    // The clock is read after the reservation was made, so this is never negative.
    seconds->scalar<double>()() = (NowNanoseconds() - holder.since) * 1e-9;
  }
};

class UnrollInboxSetLatestVersionOp : public InboxOp {
 public:
  using InboxOp::InboxOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollInbox> inbox;
    OP_REQUIRES_OK(context, Find(&inbox));
    OP_REQUIRES_OK(context, RequireScalars(context, 1));
    inbox->SetLatestVersion(context->input(0).scalar<int64_t>()());
  }
};

class UnrollInboxStatisticsOp : public InboxOp {
 public:
  using InboxOp::InboxOp;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollInbox> inbox;
    OP_REQUIRES_OK(context, Find(&inbox));
    const InboxStatistics statistics = inbox->GetStatistics();
    const uint64_t now = NowNanoseconds();
    const int64_t size = statistics.actors.size();
    Tensor *actors, *hosts, *levels, *notes, *counts, *seconds, *rejections, *queue, *copy_seconds;
    OP_REQUIRES_OK(context, context->allocate_output(0, {size}, &actors));
    OP_REQUIRES_OK(context, context->allocate_output(1, {size}, &hosts));
    OP_REQUIRES_OK(context, context->allocate_output(2, {size}, &levels));
    OP_REQUIRES_OK(context, context->allocate_output(3, {size}, &notes));
    OP_REQUIRES_OK(context, context->allocate_output(4, {size, 4}, &counts));
    OP_REQUIRES_OK(context, context->allocate_output(5, {size}, &seconds));
    OP_REQUIRES_OK(context, context->allocate_output(6, {size}, &rejections));
    OP_REQUIRES_OK(context, context->allocate_output(7, {2}, &queue));
    OP_REQUIRES_OK(context, context->allocate_output(8, {}, &copy_seconds));
    int64_t i = 0;
    for (const auto& [number, actor] : statistics.actors) {
      actors->flat<int32_t>()(i) = number;
      hosts->flat<tstring>()(i) = actor.host;
      levels->flat<tstring>()(i) = actor.level;
      notes->flat<tstring>()(i) = actor.notes;
      auto row = counts->matrix<int64_t>();
      row(i, 0) = actor.accepted;
      row(i, 1) = actor.rejected;
      row(i, 2) = actor.duplicates;
      row(i, 3) = actor.last_version;
      // The clock was read after the statistics, so this is never negative.
      seconds->flat<double>()(i) = (now - actor.last_seen) * 1e-9;
      rejections->flat<tstring>()(i) = actor.last_rejection;
      ++i;
    }
    queue->flat<int64_t>()(0) = statistics.queued;
    queue->flat<int64_t>()(1) = statistics.waiting;
    copy_seconds->scalar<double>()() = statistics.copy_seconds;
  }
};

class UnrollInboxCloseOp : public InboxOp {
 public:
  using InboxOp::InboxOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollInbox> inbox;
    OP_REQUIRES_OK(context, Find(&inbox));
    inbox->Close();
  }
};

class WeightsBoardOp : public BoardOp {
 public:
  using BoardOp::BoardOp;
  void Compute(OpKernelContext* context) override {
    OP_REQUIRES_OK(context, RequireScalars(context, 1));
    OP_REQUIRES_OK(context, Registry<WeightsBoard>::Get()->Add(
                                object_name(),
                                std::make_shared<WeightsBoard>(
                                    object_name(), context->input(0).scalar<tstring>()())));
  }
};

class WeightsBoardPublishOp : public BoardOp {
 public:
  using BoardOp::BoardOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<WeightsBoard> board;
    OP_REQUIRES_OK(context, Find(&board));
    OP_REQUIRES_OK(context, RequireScalars(context, 1));
    OpInputList weights;
    OP_REQUIRES_OK(context, context->input_list("weights", &weights));
    board->Publish(context->input(0).scalar<int64_t>()(), {weights.begin(), weights.end()});
  }
};

class WeightsBoardFinishOp : public BoardOp {
 public:
  using BoardOp::BoardOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<WeightsBoard> board;
    OP_REQUIRES_OK(context, Find(&board));
    board->Finish();
  }
};

class WeightsBoardCloseOp : public BoardOp {
 public:
  using BoardOp::BoardOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<WeightsBoard> board;
    OP_REQUIRES_OK(context, Find(&board));
    board->Close();
  }
};

class WeightsBoardSettingsOp : public BoardOp {
 public:
  using BoardOp::BoardOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<WeightsBoard> board;
    OP_REQUIRES_OK(context, Find(&board));
    Tensor* settings;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &settings));
    settings->scalar<tstring>()() = board->settings();
  }
};

class WeightsBoardVersionOp : public BoardOp {
 public:
  using BoardOp::BoardOp;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<WeightsBoard> board;
    OP_REQUIRES_OK(context, Find(&board));
    Tensor *version, *finished;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &version));
    OP_REQUIRES_OK(context, context->allocate_output(1, {}, &finished));
    OP_REQUIRES_OK(context, board->ReadVersion(&version->scalar<int64_t>()(),
                                               &finished->scalar<bool>()()));
  }
};

class WeightsBoardReadOp : public BoardOp {
 public:
  explicit WeightsBoardReadOp(OpKernelConstruction* context) : BoardOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("types", &types_));
    OP_REQUIRES_OK(context, context->GetAttr("shapes", &shapes_));
    OP_REQUIRES(context, types_.size() == shapes_.size(),
                absl::InvalidArgumentError("the lists must be of the same length"));
  }

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<WeightsBoard> board;
    OP_REQUIRES_OK(context, Find(&board));
    Tensor* version;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &version));
    std::vector<Tensor> weights;
    OP_REQUIRES_OK(context, board->ReadWeights(&version->scalar<int64_t>()(), &weights));
    OP_REQUIRES(context, weights.size() == types_.size(),
                absl::InvalidArgumentError(absl::StrCat("the network has ", weights.size(),
                                                        " weights, not ", types_.size())));
    for (size_t i = 0; i < weights.size(); ++i) {
      OP_REQUIRES(context, weights[i].dtype() == types_[i] && weights[i].shape() == shapes_[i],
                  absl::InvalidArgumentError(absl::StrCat(
                      "weight ", i, " of the network is ", DataTypeString(weights[i].dtype()),
                      weights[i].shape().DebugString(), ", not ", DataTypeString(types_[i]),
                      shapes_[i].DebugString())));
      context->set_output(i + 1, weights[i]);
    }
  }

 private:
  std::vector<tensorflow::DataType> types_;
  std::vector<TensorShape> shapes_;
};

absl::Status TakeShapes(InferenceContext* context) {
  int batch_size;
  std::vector<tensorflow::PartialTensorShape> shapes;
  std::vector<bool> time_major;
  TF_RETURN_IF_ERROR(context->GetAttr("batch_size", &batch_size));
  TF_RETURN_IF_ERROR(context->GetAttr("shapes", &shapes));
  TF_RETURN_IF_ERROR(context->GetAttr("time_major", &time_major));
  if (shapes.size() != time_major.size() || shapes.size() + 1 != context->num_outputs()) {
    return absl::InvalidArgumentError("the lists must be of the same length");
  }
  context->set_output(0, context->Vector(batch_size));
  for (size_t i = 0; i < shapes.size(); ++i) {
    ShapeHandle shape, time, rest, whole;
    TF_RETURN_IF_ERROR(context->MakeShapeFromPartialTensorShape(shapes[i], &shape));
    const int num_leading = time_major[i] ? 1 : 0;
    TF_RETURN_IF_ERROR(context->Subshape(shape, 0, num_leading, &time));
    TF_RETURN_IF_ERROR(context->Subshape(shape, num_leading, &rest));
    TF_RETURN_IF_ERROR(context->Concatenate(time, context->Vector(batch_size), &whole));
    TF_RETURN_IF_ERROR(context->Concatenate(whole, rest, &whole));
    context->set_output(i + 1, whole);
  }
  return absl::OkStatus();
}

absl::Status ReadShapes(InferenceContext* context) {
  std::vector<tensorflow::PartialTensorShape> shapes;
  TF_RETURN_IF_ERROR(context->GetAttr("shapes", &shapes));
  if (shapes.size() + 1 != context->num_outputs()) {
    return absl::InvalidArgumentError("the lists must be of the same length");
  }
  context->set_output(0, context->Scalar());
  for (size_t i = 0; i < shapes.size(); ++i) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(context->MakeShapeFromPartialTensorShape(shapes[i], &shape));
    context->set_output(i + 1, shape);
  }
  return absl::OkStatus();
}

absl::Status StatisticsShapes(InferenceContext* context) {
  for (int i : {0, 1, 2, 3, 5, 6}) context->set_output(i, context->UnknownShapeOfRank(1));
  context->set_output(4, context->Matrix(InferenceContext::kUnknownDim, 4));
  context->set_output(7, context->Vector(2));
  context->set_output(8, context->Scalar());
  return absl::OkStatus();
}

REGISTER_OP("UnrollInbox")
    .Attr("object: string")
    .Attr("capacity: int >= 1")
    .Attr("names: list(string) >= 1")
    .Attr("types: list(type) >= 1")
    .Attr("shapes: list(shape) >= 1")
    .Attr("time_major: list(bool) >= 1")
    .Attr("lows: list(int) >= 1")
    .Attr("highs: list(int) >= 1")
    .Attr("version_component: int")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("UnrollInboxPut")
    .Input("actor: int32")
    .Input("host: string")
    .Input("level: string")
    .Input("notes: string")
    .Input("client: int64")
    .Input("sequence: int64")
    .Input("unroll: types")
    .Output("accepted: bool")
    .Attr("object: string")
    .Attr("types: list(type) >= 1")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape);

REGISTER_OP("UnrollInboxTake")
    .Output("actors: int32")
    .Output("components: types")
    .Attr("object: string")
    .Attr("batch_size: int >= 1")
    .Attr("types: list(type) >= 1")
    .Attr("shapes: list(shape) >= 1")
    .Attr("time_major: list(bool) >= 1")
    .SetIsStateful()
    .SetShapeFn(TakeShapes);

REGISTER_OP("UnrollInboxReserve")
    .Input("actor: int32")
    .Input("client: int64")
    .Input("host: string")
    .Input("seconds: float64")
    .Output("is_own: bool")
    .Output("holder: string")
    .Output("seconds_since_seen: float64")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* context) {
      for (int i = 0; i < 3; ++i) context->set_output(i, context->Scalar());
      return absl::OkStatus();
    });

REGISTER_OP("UnrollInboxSetLatestVersion")
    .Input("version: int64")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("UnrollInboxStatistics")
    .Output("actors: int32")
    .Output("hosts: string")
    .Output("levels: string")
    .Output("notes: string")
    .Output("counts: int64")
    .Output("seconds_since_seen: float64")
    .Output("last_rejections: string")
    .Output("queue: int64")
    .Output("copy_seconds: float64")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn(StatisticsShapes)
    .Doc(R"doc(
`counts` are unrolls accepted, rejected, and sent again, and the last policy version; `queue` is the
number of unrolls in the queue and before it.
)doc");

REGISTER_OP("UnrollInboxClose")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("WeightsBoard")
    .Input("settings: string")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("WeightsBoardPublish")
    .Input("version: int64")
    .Input("weights: types")
    .Attr("object: string")
    .Attr("types: list(type) >= 0")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("WeightsBoardFinish")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("WeightsBoardClose")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("WeightsBoardSettings")
    .Output("settings: string")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape);

REGISTER_OP("WeightsBoardVersion")
    .Output("version: int64")
    .Output("finished: bool")
    .Attr("object: string")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* context) {
      context->set_output(0, context->Scalar());
      context->set_output(1, context->Scalar());
      return absl::OkStatus();
    });

REGISTER_OP("WeightsBoardRead")
    .Output("version: int64")
    .Output("weights: types")
    .Attr("object: string")
    .Attr("types: list(type) >= 0")
    .Attr("shapes: list(shape) >= 0")
    .SetIsStateful()
    .SetShapeFn(ReadShapes);

REGISTER_KERNEL_BUILDER(Name("UnrollInbox").Device(tensorflow::DEVICE_CPU), UnrollInboxOp);
REGISTER_KERNEL_BUILDER(Name("UnrollInboxPut").Device(tensorflow::DEVICE_CPU), UnrollInboxPutOp);
REGISTER_KERNEL_BUILDER(Name("UnrollInboxTake").Device(tensorflow::DEVICE_CPU), UnrollInboxTakeOp);
REGISTER_KERNEL_BUILDER(Name("UnrollInboxReserve").Device(tensorflow::DEVICE_CPU),
                        UnrollInboxReserveOp);
REGISTER_KERNEL_BUILDER(Name("UnrollInboxSetLatestVersion").Device(tensorflow::DEVICE_CPU),
                        UnrollInboxSetLatestVersionOp);
REGISTER_KERNEL_BUILDER(Name("UnrollInboxStatistics").Device(tensorflow::DEVICE_CPU),
                        UnrollInboxStatisticsOp);
REGISTER_KERNEL_BUILDER(Name("UnrollInboxClose").Device(tensorflow::DEVICE_CPU),
                        UnrollInboxCloseOp);
REGISTER_KERNEL_BUILDER(Name("WeightsBoard").Device(tensorflow::DEVICE_CPU), WeightsBoardOp);
REGISTER_KERNEL_BUILDER(Name("WeightsBoardPublish").Device(tensorflow::DEVICE_CPU),
                        WeightsBoardPublishOp);
REGISTER_KERNEL_BUILDER(Name("WeightsBoardFinish").Device(tensorflow::DEVICE_CPU),
                        WeightsBoardFinishOp);
REGISTER_KERNEL_BUILDER(Name("WeightsBoardClose").Device(tensorflow::DEVICE_CPU),
                        WeightsBoardCloseOp);
REGISTER_KERNEL_BUILDER(Name("WeightsBoardSettings").Device(tensorflow::DEVICE_CPU),
                        WeightsBoardSettingsOp);
REGISTER_KERNEL_BUILDER(Name("WeightsBoardVersion").Device(tensorflow::DEVICE_CPU),
                        WeightsBoardVersionOp);
REGISTER_KERNEL_BUILDER(Name("WeightsBoardRead").Device(tensorflow::DEVICE_CPU),
                        WeightsBoardReadOp);

}  // namespace
}  // namespace impala
