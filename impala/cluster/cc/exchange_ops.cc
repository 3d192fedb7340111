// TensorFlow ops of the unroll inbox; see exchange.h.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dynamic_batching/cc/clock.h"
#include "exchange.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace impala {
namespace {

using dynamic_batching::NowNanoseconds;
using tensorflow::AsyncOpKernel;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::ResourceHandle;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::tstring;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// The inbox behind a handle. Waiting calls and cancellations share the inbox itself.
class InboxResource : public tensorflow::ResourceBase {
 public:
  explicit InboxResource(std::shared_ptr<UnrollInbox> inbox) : inbox_(std::move(inbox)) {}
  ~InboxResource() override { inbox_->Close(); }
  std::string DebugString() const override { return "UnrollInbox"; }
  const std::shared_ptr<UnrollInbox>& inbox() const { return inbox_; }

 private:
  const std::shared_ptr<UnrollInbox> inbox_;
};

// Returns the inbox of the handle in input 0 of `context`.
absl::StatusOr<std::shared_ptr<UnrollInbox>> FindInbox(OpKernelContext* context) {
  absl::StatusOr<InboxResource*> resource =
      tensorflow::HandleFromInput(context, 0).GetResource<InboxResource>();
  if (!resource.ok()) return resource.status();
  return (*resource)->inbox();
}

absl::Status RequireScalars(OpKernelContext* context, int num_inputs) {
  for (int i = 0; i < num_inputs; ++i) {
    if (context->input(i).dims() != 0) {
      return absl::InvalidArgumentError(absl::StrCat("input ", i, " must be a scalar"));
    }
  }
  return absl::OkStatus();
}

class UnrollInboxOp : public OpKernel {
 public:
  explicit UnrollInboxOp(OpKernelConstruction* context) : OpKernel(context) {
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
    OP_REQUIRES_OK(context, context->GetAttr("stack", &stack_));
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
    OP_REQUIRES(context,
                stack_ == -1 || (stack_ >= 0 && stack_ < size &&
                                 types[stack_] == tensorflow::DT_UINT8 && time_major[stack_] &&
                                 shapes[stack_].dims() > 1 && shapes[stack_].num_elements() > 0),
                absl::InvalidArgumentError("a stack of frames must be uint8 [T+1, ..., C]"));
  }

  void Compute(OpKernelContext* context) override {
    Tensor* handle;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &handle));
    handle->scalar<ResourceHandle>()() = ResourceHandle::MakeRefCountingHandle(
        new InboxResource(
            std::make_shared<UnrollInbox>(capacity_, components_, version_component_, stack_)),
        context->device()->name());
  }

 private:
  std::vector<UnrollArray> components_;
  int capacity_, version_component_, stack_;
};

class UnrollInboxPutOp : public AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const auto inbox = FindInbox(context);
    OP_REQUIRES_OK_ASYNC(context, inbox.status(), done);
    const Tensor& texts = context->input(1);
    const Tensor& numbers = context->input(2);
    OP_REQUIRES_ASYNC(context, texts.NumElements() == 3 && numbers.NumElements() == 3,
                      absl::InvalidArgumentError("there must be three texts and three numbers"),
                      done);
    const auto text = texts.flat<tstring>();
    const auto number = numbers.flat<int64_t>();
    (*inbox)->Put(context, {text(0), text(1), text(2), number(0), number(1), number(2)},
                  context->input(3), std::move(done));
  }
};

class UnrollInboxTakeOp : public AsyncOpKernel {
 public:
  explicit UnrollInboxTakeOp(OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("batch_size", &batch_size_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const auto inbox = FindInbox(context);
    OP_REQUIRES_OK_ASYNC(context, inbox.status(), done);
    (*inbox)->Take(context, batch_size_, std::move(done));
  }

 private:
  int batch_size_;
};

class UnrollInboxReserveOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    const auto inbox = FindInbox(context);
    OP_REQUIRES_OK(context, inbox.status());
    OP_REQUIRES_OK(context, RequireScalars(context, 5));
    const int64_t client = context->input(2).scalar<int64_t>()();
    Reservation holder;
    OP_REQUIRES_OK(context, (*inbox)->Reserve(context->input(1).scalar<int32_t>()(), client,
                                              context->input(3).scalar<tstring>()(),
                                              context->input(4).scalar<double>()(), &holder));
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

class UnrollInboxSetLatestVersionOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    const auto inbox = FindInbox(context);
    OP_REQUIRES_OK(context, inbox.status());
    OP_REQUIRES_OK(context, RequireScalars(context, 2));
    (*inbox)->SetLatestVersion(context->input(1).scalar<int64_t>()());
  }
};

class UnrollInboxStatisticsOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const auto inbox = FindInbox(context);
    OP_REQUIRES_OK(context, inbox.status());
    const InboxStatistics statistics = (*inbox)->GetStatistics();
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

class UnrollInboxCloseOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    const auto inbox = FindInbox(context);
    OP_REQUIRES_OK(context, inbox.status());
    (*inbox)->Close();
  }
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

absl::Status StatisticsShapes(InferenceContext* context) {
  for (int i : {0, 1, 2, 3, 5, 6}) context->set_output(i, context->UnknownShapeOfRank(1));
  context->set_output(4, context->Matrix(InferenceContext::kUnknownDim, 4));
  context->set_output(7, context->Vector(2));
  context->set_output(8, context->Scalar());
  return absl::OkStatus();
}

REGISTER_OP("UnrollInbox")
    .Output("inbox: resource")
    .Attr("capacity: int >= 1")
    .Attr("names: list(string) >= 1")
    .Attr("types: list(type) >= 1")
    .Attr("shapes: list(shape) >= 1")
    .Attr("time_major: list(bool) >= 1")
    .Attr("lows: list(int) >= 1")
    .Attr("highs: list(int) >= 1")
    .Attr("version_component: int")
    .Attr("stack: int")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape);

REGISTER_OP("UnrollInboxPut")
    .Input("inbox: resource")
    .Input("texts: string")
    .Input("numbers: int64")
    .Input("unroll: uint8")
    .Output("accepted: bool")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape)
    .Doc(R"doc(
`texts` are host, level and notes, `numbers` are actor, client and sequence: few inputs, because each
takes Python as long as the rest of the call.
)doc");

REGISTER_OP("UnrollInboxTake")
    .Input("inbox: resource")
    .Output("actors: int32")
    .Output("components: types")
    .Attr("batch_size: int >= 1")
    .Attr("types: list(type) >= 1")
    .Attr("shapes: list(shape) >= 1")
    .Attr("time_major: list(bool) >= 1")
    .SetIsStateful()
    .SetShapeFn(TakeShapes);

REGISTER_OP("UnrollInboxReserve")
    .Input("inbox: resource")
    .Input("actor: int32")
    .Input("client: int64")
    .Input("host: string")
    .Input("seconds: float64")
    .Output("is_own: bool")
    .Output("holder: string")
    .Output("seconds_since_seen: float64")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* context) {
      for (int i = 0; i < 3; ++i) context->set_output(i, context->Scalar());
      return absl::OkStatus();
    });

REGISTER_OP("UnrollInboxSetLatestVersion")
    .Input("inbox: resource")
    .Input("version: int64")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("UnrollInboxStatistics")
    .Input("inbox: resource")
    .Output("actors: int32")
    .Output("hosts: string")
    .Output("levels: string")
    .Output("notes: string")
    .Output("counts: int64")
    .Output("seconds_since_seen: float64")
    .Output("last_rejections: string")
    .Output("queue: int64")
    .Output("copy_seconds: float64")
    .SetIsStateful()
    .SetShapeFn(StatisticsShapes)
    .Doc(R"doc(
`counts` are unrolls accepted, rejected, and sent again, and the last policy version; `queue` is the
number of unrolls in the queue and before it.
)doc");

REGISTER_OP("UnrollInboxClose")
    .Input("inbox: resource")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

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

}  // namespace
}  // namespace impala
