// TensorFlow ops of the batcher of actor processes; see unroll_batcher.h.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "unroll_batcher.h"

namespace dynamic_batching {
namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::ResourceHandle;
using tensorflow::Tensor;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;
using tensorflow::core::RefCountPtr;

// A year: far from where nanoseconds overflow.
constexpr float kLongestTimeoutMs = 3e10;

// What a handle refers to. The batcher itself is shared with its threads and with waiting ops.
class UnrollBatcherResource : public tensorflow::ResourceBase {
 public:
  explicit UnrollBatcherResource(std::shared_ptr<UnrollBatcher> batcher)
      : batcher_(std::move(batcher)) {}
  ~UnrollBatcherResource() override { batcher_->Close(); }
  std::string DebugString() const override { return "UnrollBatcher"; }
  const std::shared_ptr<UnrollBatcher>& batcher() const { return batcher_; }

 private:
  const std::shared_ptr<UnrollBatcher> batcher_;
};

absl::Status LookupBatcher(OpKernelContext* context, std::shared_ptr<UnrollBatcher>* batcher) {
  RefCountPtr<UnrollBatcherResource> resource;
  TF_RETURN_IF_ERROR(
      LookupResource(context, tensorflow::HandleFromInput(context, 0), &resource));
  *batcher = resource->batcher();
  return absl::OkStatus();
}

class UnrollBatcherOp : public OpKernel {
 public:
  explicit UnrollBatcherOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("input_types", &spec_.input_types));
    OP_REQUIRES_OK(context, context->GetAttr("input_shapes", &spec_.input_shapes));
    OP_REQUIRES_OK(context, context->GetAttr("output_types", &spec_.output_types));
    OP_REQUIRES_OK(context, context->GetAttr("output_shapes", &spec_.output_shapes));
    OP_REQUIRES_OK(context, context->GetAttr("state_types", &spec_.state_types));
    OP_REQUIRES_OK(context, context->GetAttr("state_shapes", &spec_.state_shapes));
    OP_REQUIRES_OK(context, context->GetAttr("num_unrolls", &options_.num_unrolls));
    OP_REQUIRES_OK(context, context->GetAttr("rows", &options_.rows));
    OP_REQUIRES_OK(context, context->GetAttr("minimum_batch_size", &options_.minimum_batch_size));
    OP_REQUIRES_OK(context, context->GetAttr("maximum_batch_size", &options_.maximum_batch_size));
    OP_REQUIRES_OK(context, context->GetAttr("max_discarded_in_a_row",
                                             &options_.max_discarded_in_a_row));
    float timeout_ms;
    OP_REQUIRES_OK(context, context->GetAttr("timeout_ms", &timeout_ms));
    OP_REQUIRES(context, timeout_ms >= 0 && timeout_ms <= kLongestTimeoutMs,
                absl::InvalidArgumentError(absl::StrCat("timeout_ms must be in [0, ",
                                                        kLongestTimeoutMs, "]")));
    options_.timeout_nanoseconds = timeout_ms * 1e6;
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& levels = context->input(1);
    const auto level_ids = levels.flat<int32_t>();
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, UnrollBatcher::Create(
                                context->input(0).scalar<int32_t>()(), spec_, options_,
                                {level_ids.data(), level_ids.data() + level_ids.size()}, &batcher));
    Tensor* handle;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &handle));
    handle->scalar<ResourceHandle>()() = ResourceHandle::MakeRefCountingHandle(
        new UnrollBatcherResource(std::move(batcher)), context->device()->name());
  }

 private:
  UnrollSpec spec_;
  UnrollBatcherOptions options_;
};

class UnrollBatcherGetOp : public AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;
  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK_ASYNC(context, LookupBatcher(context, &batcher), done);
    batcher->GetInputs(context, std::move(done));
  }
};

class UnrollBatcherSetOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, LookupBatcher(context, &batcher));
    tensorflow::OpInputList outputs, states;
    OP_REQUIRES_OK(context, context->input_list("outputs", &outputs));
    OP_REQUIRES_OK(context, context->input_list("states", &states));
    OP_REQUIRES(context, context->input(3).dims() == 0,
                absl::InvalidArgumentError("policy_version must be a scalar"));
    OP_REQUIRES_OK(context,
                   batcher->SetOutputs(context->input(1), context->input(2),
                                       context->input(3).scalar<int64_t>()(), outputs, states));
  }
};

class UnrollBatcherDequeueOp : public AsyncOpKernel {
 public:
  explicit UnrollBatcherDequeueOp(OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("batch_size", &batch_size_));
    std::vector<tensorflow::DataType> input_types;
    OP_REQUIRES_OK(context, context->GetAttr("input_types", &input_types));
    num_inputs_ = input_types.size();
  }
  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK_ASYNC(context, LookupBatcher(context, &batcher), done);
    batcher->Dequeue(context, batch_size_, num_inputs_, std::move(done));
  }

 private:
  int batch_size_;
  int num_inputs_;
};

class UnrollBatcherResetActorOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, LookupBatcher(context, &batcher));
    OP_REQUIRES_OK(context, batcher->ResetActor(context->input(1).scalar<int32_t>()()));
  }
};

class UnrollBatcherAssignActorOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, LookupBatcher(context, &batcher));
    OP_REQUIRES_OK(context, batcher->AssignActor(context->input(1).scalar<int32_t>()(),
                                                 context->input(2).scalar<int32_t>()()));
  }
};

class UnrollBatcherCloseOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, LookupBatcher(context, &batcher));
    batcher->Close();
  }
};

class UnrollBatcherStatisticsOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, LookupBatcher(context, &batcher));
    const std::vector<int64_t> completed = batcher->CompletedUnrolls();
    const std::vector<double> seconds = batcher->StageSeconds();
    Tensor *names, *stage_seconds, *completed_unrolls;
    const int64_t num_stages = seconds.size();
    OP_REQUIRES_OK(context, context->allocate_output(0, {num_stages}, &names));
    OP_REQUIRES_OK(context, context->allocate_output(1, {num_stages}, &stage_seconds));
    OP_REQUIRES_OK(context,
                   context->allocate_output(2, {static_cast<int64_t>(completed.size())},
                                            &completed_unrolls));
    for (int i = 0; i < num_stages; ++i) {
      names->flat<tensorflow::tstring>()(i) = kStageNames[i];
      stage_seconds->flat<double>()(i) = seconds[i];
    }
    std::copy(completed.begin(), completed.end(), completed_unrolls->flat<int64_t>().data());
    Tensor *batches, *rows;
    OP_REQUIRES_OK(context, context->allocate_output(3, {}, &batches));
    OP_REQUIRES_OK(context, context->allocate_output(4, {}, &rows));
    batches->scalar<int64_t>()() = batcher->NumBatches();
    rows->scalar<int64_t>()() = batcher->NumRows();
    const UnrollCounts counts = batcher->Counts();
    Tensor *unrolls, *non_finite, *value;
    OP_REQUIRES_OK(context, context->allocate_output(5, {3}, &unrolls));
    OP_REQUIRES_OK(context, context->allocate_output(6, {2}, &non_finite));
    OP_REQUIRES_OK(context, context->allocate_output(7, {}, &value));
    unrolls->flat<int64_t>()(0) = counts.queued;
    unrolls->flat<int64_t>()(1) = counts.discarded;
    unrolls->flat<int64_t>()(2) = counts.discarded_in_a_row;
    non_finite->flat<int32_t>()(0) = counts.non_finite_actor;
    non_finite->flat<int32_t>()(1) = counts.non_finite;
    value->scalar<float>()() = counts.non_finite_value;
  }
};

class UnrollBatcherPolicyVersionsOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, LookupBatcher(context, &batcher));
    const std::vector<int64_t> versions = batcher->PolicyVersions();
    Tensor* output;
    OP_REQUIRES_OK(context,
                   context->allocate_output(0, {static_cast<int64_t>(versions.size())}, &output));
    std::copy(versions.begin(), versions.end(), output->flat<int64_t>().data());
  }
};

class UnrollBatcherActivityOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    std::shared_ptr<UnrollBatcher> batcher;
    OP_REQUIRES_OK(context, LookupBatcher(context, &batcher));
    const auto activities = batcher->Activities();
    const int64_t num_actors = activities.size();
    Tensor *states, *progress, *closed;
    OP_REQUIRES_OK(context, context->allocate_output(0, {num_actors}, &states));
    OP_REQUIRES_OK(context, context->allocate_output(1, {num_actors}, &progress));
    OP_REQUIRES_OK(context, context->allocate_output(2, {}, &closed));
    for (int64_t i = 0; i < num_actors; ++i) {
      states->flat<int32_t>()(i) = activities[i].state;
      progress->flat<int64_t>()(i) = activities[i].progress;
    }
    closed->scalar<bool>()() = batcher->IsClosed();
  }
};

using Dimensions = std::vector<tensorflow::shape_inference::DimensionHandle>;

absl::Status SetShape(InferenceContext* c, const tensorflow::PartialTensorShape& shape,
                      const Dimensions& leading, int* output) {
  ShapeHandle rest, whole;
  TF_RETURN_IF_ERROR(c->MakeShapeFromPartialTensorShape(shape, &rest));
  TF_RETURN_IF_ERROR(c->Concatenate(c->MakeShape(leading), rest, &whole));
  c->set_output((*output)++, whole);
  return absl::OkStatus();
}

absl::Status SetShape(InferenceContext* c, const char* attribute, const Dimensions& leading,
                      int* output) {
  tensorflow::PartialTensorShape shape;
  TF_RETURN_IF_ERROR(c->GetAttr(attribute, &shape));
  return SetShape(c, shape, leading, output);
}

absl::Status SetShapes(InferenceContext* c, const char* attribute, const Dimensions& leading,
                       int* output) {
  std::vector<tensorflow::PartialTensorShape> shapes;
  TF_RETURN_IF_ERROR(c->GetAttr(attribute, &shapes));
  for (const auto& shape : shapes) TF_RETURN_IF_ERROR(SetShape(c, shape, leading, output));
  return absl::OkStatus();
}

REGISTER_OP("UnrollBatcher")
    .Input("fd: int32")
    .Input("level_ids: int32")
    .Output("handle: resource")
    .Attr("input_types: list(type)")
    .Attr("input_shapes: list(shape)")
    .Attr("output_types: list(type)")
    .Attr("output_shapes: list(shape)")
    .Attr("state_types: list(type) >= 0")
    .Attr("state_shapes: list(shape) >= 0")
    .Attr("num_unrolls: int")
    .Attr("rows: int")
    .Attr("minimum_batch_size: int")
    .Attr("maximum_batch_size: int")
    .Attr("timeout_ms: float")
    .Attr("max_discarded_in_a_row: int")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape);

REGISTER_OP("UnrollBatcherGet")
    .Input("handle: resource")
    .Output("actors: int32")
    .Output("epochs: int64")
    .Output("inputs: input_types")
    .Output("last_action: action_type")
    .Output("states: state_types")
    .Attr("input_types: list(type)")
    .Attr("input_shapes: list(shape)")
    .Attr("action_type: type")
    .Attr("action_shape: shape")
    .Attr("state_types: list(type) >= 0")
    .Attr("state_shapes: list(shape) >= 0")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      const auto batch = c->UnknownDim();
      int output = 0;
      c->set_output(output++, c->Vector(batch));
      c->set_output(output++, c->Vector(batch));
      TF_RETURN_IF_ERROR(SetShapes(c, "input_shapes", {batch}, &output));
      TF_RETURN_IF_ERROR(SetShape(c, "action_shape", {batch}, &output));
      return SetShapes(c, "state_shapes", {batch}, &output);
    });

REGISTER_OP("UnrollBatcherSet")
    .Input("handle: resource")
    .Input("actors: int32")
    .Input("epochs: int64")
    .Input("policy_version: int64")
    .Input("outputs: output_types")
    .Input("states: state_types")
    .Attr("output_types: list(type)")
    .Attr("state_types: list(type) >= 0")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("UnrollBatcherDequeue")
    .Input("handle: resource")
    .Output("level_ids: int32")
    .Output("actors: int32")
    .Output("policy_versions: int64")
    .Output("states: state_types")
    .Output("inputs: input_types")
    .Output("outputs: output_types")
    .Attr("batch_size: int >= 1")
    .Attr("rows: int")
    .Attr("input_types: list(type)")
    .Attr("input_shapes: list(shape)")
    .Attr("output_types: list(type)")
    .Attr("output_shapes: list(shape)")
    .Attr("state_types: list(type) >= 0")
    .Attr("state_shapes: list(shape) >= 0")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      int batch_size, rows;
      TF_RETURN_IF_ERROR(c->GetAttr("batch_size", &batch_size));
      TF_RETURN_IF_ERROR(c->GetAttr("rows", &rows));
      int output = 0;
      for (int i = 0; i < 3; ++i) c->set_output(output++, c->Vector(batch_size));
      const auto batch = c->MakeDim(batch_size), time = c->MakeDim(rows);
      TF_RETURN_IF_ERROR(SetShapes(c, "state_shapes", {batch}, &output));
      TF_RETURN_IF_ERROR(SetShapes(c, "input_shapes", {time, batch}, &output));
      return SetShapes(c, "output_shapes", {time, batch}, &output);
    });

REGISTER_OP("UnrollBatcherResetActor")
    .Input("handle: resource")
    .Input("actor: int32")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("UnrollBatcherAssignActor")
    .Input("handle: resource")
    .Input("actor: int32")
    .Input("level_id: int32")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("UnrollBatcherClose")
    .Input("handle: resource")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("UnrollBatcherStatistics")
    .Input("handle: resource")
    .Output("stage_names: string")
    .Output("stage_seconds: float64")
    .Output("completed_unrolls: int64")
    .Output("batches: int64")
    .Output("rows: int64")
    .Output("unrolls: int64")
    .Output("non_finite: int32")
    .Output("non_finite_value: float32")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      for (int i = 0; i < 3; ++i) c->set_output(i, c->UnknownShapeOfRank(1));
      for (int i : {3, 4, 7}) c->set_output(i, c->Scalar());
      c->set_output(5, c->Vector(3));
      c->set_output(6, c->Vector(2));
      return absl::OkStatus();
    });

REGISTER_OP("UnrollBatcherPolicyVersions")
    .Input("handle: resource")
    .Output("policy_versions: int64")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->UnknownShapeOfRank(1));
      return absl::OkStatus();
    });

REGISTER_OP("UnrollBatcherActivity")
    .Input("handle: resource")
    .Output("states: int32")
    .Output("progress: int64")
    .Output("closed: bool")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->UnknownShapeOfRank(1));
      c->set_output(1, c->UnknownShapeOfRank(1));
      c->set_output(2, c->Scalar());
      return absl::OkStatus();
    });

REGISTER_KERNEL_BUILDER(Name("UnrollBatcher").Device(tensorflow::DEVICE_CPU), UnrollBatcherOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherGet").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherGetOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherSet").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherSetOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherDequeue").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherDequeueOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherResetActor").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherResetActorOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherAssignActor").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherAssignActorOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherClose").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherCloseOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherStatistics").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherStatisticsOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherPolicyVersions").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherPolicyVersionsOp);
REGISTER_KERNEL_BUILDER(Name("UnrollBatcherActivity").Device(tensorflow::DEVICE_CPU),
                        UnrollBatcherActivityOp);

}  // namespace
}  // namespace dynamic_batching
