// One step of RMSProp without momentum, in one pass over memory.
//
// A step is bound by memory. TensorFlow's own kernel makes three passes, reads and writes an unused
// momentum, and first copies variables that are being read elsewhere.

#include <cmath>
#include <cstdint>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

namespace impala {
namespace {

using tensorflow::HandleFromInput;
using tensorflow::LookupResource;
using tensorflow::mutex_lock;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::Var;
using tensorflow::core::RefCountPtr;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// In processor cycles, by which TensorFlow decides how many threads a step is worth.
constexpr int64_t kCyclesPerWeight = 10;

// Sets `target` to what a variable's new value is written to: its own memory, unless that is being
// read elsewhere.
absl::Status Target(OpKernelContext* context, const Tensor& value, Tensor* target) {
  if (value.RefCountIsOne()) {
    *target = value;
    return absl::OkStatus();
  }
  return context->allocate_temp(value.dtype(), value.shape(), target);
}

class ApplyRmsPropOp : public OpKernel {
 public:
  explicit ApplyRmsPropOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("decay", &decay_));
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
  }

  void Compute(OpKernelContext* context) override {
    RefCountPtr<Var> parameter, mean_square;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &parameter));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &mean_square));
    const Tensor& gradient = context->input(2);
    mutex_lock parameter_lock(*parameter->mu());
    mutex_lock mean_square_lock(*mean_square->mu());
    OP_REQUIRES(context,
                parameter->tensor()->shape() == gradient.shape() &&
                    mean_square->tensor()->shape() == gradient.shape(),
                absl::InvalidArgumentError("parameter, mean square and gradient differ in shape"));
    Tensor new_parameter, new_mean_square;
    OP_REQUIRES_OK(context, Target(context, *parameter->tensor(), &new_parameter));
    OP_REQUIRES_OK(context, Target(context, *mean_square->tensor(), &new_mean_square));

    const float* weights = parameter->tensor()->flat<float>().data();
    const float* squares = mean_square->tensor()->flat<float>().data();
    const float* gradients = gradient.flat<float>().data();
    const float learning_rate = context->input(3).scalar<float>()();
    float* new_weights = new_parameter.flat<float>().data();
    float* new_squares = new_mean_square.flat<float>().data();
    const float rest = 1.0f - decay_, epsilon = epsilon_;
    auto step = [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float g = gradients[i];
        const float square = squares[i] + (g * g - squares[i]) * rest;
        new_squares[i] = square;
        new_weights[i] = weights[i] - g * learning_rate / std::sqrt(square + epsilon);
      }
    };
    auto* workers = context->device()->tensorflow_cpu_worker_threads();
    tensorflow::Shard(workers->num_threads, workers->workers, gradient.NumElements(),
                      kCyclesPerWeight, step);
    *parameter->tensor() = new_parameter;
    *mean_square->tensor() = new_mean_square;
  }

 private:
  float decay_, epsilon_;
};

REGISTER_OP("ApplyRmsProp")
    .Input("parameter: resource")
    .Input("mean_square: resource")
    .Input("gradient: float")
    .Input("learning_rate: float")
    .Attr("decay: float")
    .Attr("epsilon: float")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle scalar;
      return context->WithRank(context->input(3), 0, &scalar);
    })
    .Doc(R"doc(
Takes one step of RMSProp as in TensorFlow 1 without momentum.

parameter: f32 variable; becomes parameter - learning_rate * gradient / sqrt(mean_square + epsilon).
mean_square: f32 variable, shaped like the parameter; first becomes
  mean_square + (1 - decay) * (gradient^2 - mean_square).
gradient: shaped like the parameter.
learning_rate: scalar.
decay: of the running mean, per step.
epsilon: added to the mean square, inside the root.
)doc");

REGISTER_KERNEL_BUILDER(Name("ApplyRmsProp").Device(tensorflow::DEVICE_CPU), ApplyRmsPropOp);

}  // namespace
}  // namespace impala
