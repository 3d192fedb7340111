// TensorFlow ops of the in-process batcher; see batcher.h.

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "batcher.h"
#include "tensorflow/core/common_runtime/device_mgr.h"
#include "tensorflow/core/common_runtime/graph_constructor.h"
#include "tensorflow/core/common_runtime/input_colocation_exemption_registry.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/device.h"
#include "tensorflow/core/framework/function.h"
#include "tensorflow/core/framework/graph.pb.h"
#include "tensorflow/core/framework/graph_to_functiondef.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/graph/graph.h"
#include "tensorflow/core/grappler/optimizers/meta_optimizer.h"
#include "tensorflow/core/platform/logging.h"

namespace dynamic_batching {
namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::FunctionLibraryDefinition;
using tensorflow::FunctionLibraryRuntime;
using tensorflow::GraphDef;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::ResourceHandle;
using tensorflow::Tensor;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// The resource behind a handle. Calls, the timer and cancellations share the batcher itself.
class BatcherResource : public tensorflow::ResourceBase {
 public:
  explicit BatcherResource(Batcher* batcher) : batcher_(batcher) {}
  ~BatcherResource() override {
    batcher_->Close();
    batcher_->Unref();
  }
  std::string DebugString() const override { return "Batcher"; }
  Batcher* batcher() const { return batcher_; }

 private:
  Batcher* const batcher_;
};

// Returns the batcher, which lives at least as long as the handle in input 0 of `context`.
absl::StatusOr<Batcher*> FindBatcher(OpKernelContext* context) {
  absl::StatusOr<BatcherResource*> resource =
      tensorflow::HandleFromInput(context, 0).GetResource<BatcherResource>();
  if (!resource.ok()) return resource.status();
  return (*resource)->batcher();
}

// Replaces a multi-device instance of a function by a single-device one. The overhead of several
// devices is about as large as the computation of a small function. Fails, and changes nothing, if
// the function has unused inputs, because the runtime has dropped these.
//
// `graph_def` is the runtime's graph of the multi-device function. It is optimized, which the
// runtime does not do for functions instantiated for one device. All of its nodes are on the device
// of `function->library`.
absl::Status RunOnOneDevice(const GraphDef& graph_def, BatchedFunction* function) {
  const size_t num_inputs =
      std::count_if(graph_def.node().begin(), graph_def.node().end(),
                    [](const auto& node) { return node.op() == "_Arg"; });
  if (num_inputs != function->input_types.size() + function->captured.size()) {
    return absl::OkStatus();
  }
  tensorflow::GraphConstructorOptions options;
  options.allow_internal_ops = true;
  options.expect_device_spec = true;
  auto definitions = std::make_shared<FunctionLibraryDefinition>(
      tensorflow::OpRegistry::Global(), graph_def.library());
  tensorflow::Graph graph(tensorflow::OpRegistry::Global());
  TF_RETURN_IF_ERROR(ConvertGraphDefToGraph(options, graph_def, &graph));
  // The runtime tells functions apart by their names.
  static std::atomic<int64_t> count{0};
  const std::string name = absl::StrCat("batched_on_one_device_", ++count);
  tensorflow::FunctionDef definition;
  TF_RETURN_IF_ERROR(GraphToFunctionDef(graph, name, &definition));
  TF_RETURN_IF_ERROR(definitions->AddFunctionDef(definition));
  FunctionLibraryRuntime* const library = function->library;
  FunctionLibraryRuntime::InstantiateOptions instantiation;
  instantiation.target = library->device()->name();
  instantiation.lib_def = definitions.get();
  if (library->config_proto() != nullptr) instantiation.config_proto = *library->config_proto();
  FunctionLibraryRuntime::Handle handle;
  TF_RETURN_IF_ERROR(
      library->Instantiate(name, tensorflow::AttrSlice(), instantiation, &handle));
  std::swap(function->handle, handle);
  function->definitions = std::move(definitions);
  return library->ReleaseHandle(handle);
}

class DynamicBatcherOp : public OpKernel {
 public:
  explicit DynamicBatcherOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("f", &f_));
    OP_REQUIRES_OK(context, context->GetAttr("label", &function_.name));
    OP_REQUIRES_OK(context, context->GetAttr("input_names", &function_.input_names));
    OP_REQUIRES_OK(context, context->GetAttr("input_types", &function_.input_types));
    OP_REQUIRES_OK(context, context->GetAttr("row_shapes", &function_.row_shapes));
    OP_REQUIRES_OK(context, context->GetAttr("num_outputs", &num_outputs_));
    const size_t num_inputs = function_.input_types.size();
    OP_REQUIRES(
        context,
        num_inputs > 0 && function_.row_shapes.size() == num_inputs &&
            function_.input_names.size() == num_inputs,
        absl::InvalidArgumentError("input_names, input_types and row_shapes must go together"));
    for (size_t i = 0; i < num_inputs; ++i) {
      OP_REQUIRES(context,
                  tensorflow::DataTypeCanUseMemcpy(function_.input_types[i]) ||
                      function_.input_types[i] == tensorflow::DT_STRING,
                  absl::InvalidArgumentError(
                      absl::StrCat("Input ", function_.input_names[i], " of '", function_.name,
                                   "' is of type ", DataTypeString(function_.input_types[i]),
                                   ", which cannot be batched")));
      OP_REQUIRES(context,
                  function_.row_shapes[i].dims() > 0 && function_.row_shapes[i].dim_size(0) == 1,
                  absl::InvalidArgumentError(absl::StrCat(
                      "Input ", function_.input_names[i], " of '", function_.name, "' has shape ",
                      function_.row_shapes[i].DebugString(),
                      ", but must have leading dimension 1")));
    }
    int64_t minimum, maximum, timeout_ms;
    OP_REQUIRES_OK(context, context->GetAttr("minimum_batch_size", &minimum));
    OP_REQUIRES_OK(context, context->GetAttr("maximum_batch_size", &maximum));
    OP_REQUIRES_OK(context, context->GetAttr("timeout_ms", &timeout_ms));
    OP_REQUIRES(
        context, 1 <= minimum && minimum <= maximum,
        absl::InvalidArgumentError("1 <= minimum_batch_size <= maximum_batch_size must hold"));
    policy_.minimum_batch_size = minimum;
    policy_.maximum_batch_size = maximum;
    if (timeout_ms >= 0) policy_.timeout = std::chrono::milliseconds(timeout_ms);
  }

  void Compute(OpKernelContext* context) override {
    FunctionLibraryRuntime* const library = context->function_library();
    OP_REQUIRES(context, library != nullptr,
                absl::FailedPreconditionError("No function library to find the function in"));
    BatchedFunction function = function_;
    function.library = library;
    FunctionLibraryRuntime::InstantiateOptions options;
    options.target = library->device()->name();
    // Lets the function use a GPU: rows come from and return to the host, and the rest is placed as
    // in any other tf.function.
    options.is_multi_device_function = true;
    options.default_device_to_target = false;
    if (library->config_proto() != nullptr) options.config_proto = *library->config_proto();
    tensorflow::Device* host;
    OP_REQUIRES_OK(context, library->device_mgr()->LookupDevice("CPU:0", &host));
    options.input_devices.assign(function.row_shapes.size(), host->name());
    for (int i = 0; i < context->num_inputs(); ++i) {
      const Tensor& captured = context->input(i);
      function.captured.push_back(captured);
      if (captured.dtype() != tensorflow::DT_RESOURCE) {
        options.input_devices.push_back(host->name());
        continue;
      }
      const ResourceHandle& handle = captured.flat<ResourceHandle>()(0);
      const auto& types_and_shapes = handle.dtypes_and_shapes();
      if (!types_and_shapes.empty()) {
        options.input_resource_dtypes_and_shapes[options.input_devices.size()] =
            types_and_shapes.front();
      }
      options.input_devices.push_back(handle.device());
    }
    options.output_devices.assign(num_outputs_, host->name());
    // The options that TensorFlow uses for a call of a tf.function.
    tensorflow::grappler::GrapplerItem::OptimizationOptions optimizations;
    optimizations.allow_pruning_stateful_and_dataset_ops = true;
    optimizations.is_eager_mode = true;
    optimizations.optimize_function_library = false;
    using std::placeholders::_1, std::placeholders::_2, std::placeholders::_3;
    using std::placeholders::_4, std::placeholders::_5, std::placeholders::_6;
    options.optimize_graph_fn =
        std::bind(tensorflow::grappler::OptimizeGraph, _1, _2, _3, _4, _5, options.config_proto,
                  f_.name(), optimizations, _6);
    tensorflow::GraphCollector collector;
    options.graph_collector = &collector;
    OP_REQUIRES_OK(context, library->Instantiate(f_.name(), tensorflow::AttrSlice(&f_.attr()),
                                                 options, &function.handle));
    const std::string& own_device = library->device()->name();
    tensorflow::mutex_lock lock(collector.mu);
    const std::vector<GraphDef>& parts = collector.partitioned_graphs;
    if (parts.size() == 1 &&
        std::all_of(parts[0].node().begin(), parts[0].node().end(),
                    [&](const auto& node) { return node.device() == own_device; })) {
      const absl::Status status = RunOnOneDevice(parts[0], &function);
      // The multi-device function works, too.
      if (!status.ok()) VLOG(1) << "'" << function.name << "' is not for one device: " << status;
    }
    Tensor* handle;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &handle));
    handle->scalar<ResourceHandle>()() = ResourceHandle::MakeRefCountingHandle(
        new BatcherResource(new Batcher(std::move(function), policy_)), host->name());
  }

 private:
  tensorflow::NameAttrList f_;
  BatchedFunction function_;
  BatchPolicy policy_;
  int64_t num_outputs_;
};

class DynamicBatchOp : public AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;

  // An expensive op would be moved to another thread first.
  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const absl::StatusOr<Batcher*> batcher = FindBatcher(context);
    OP_REQUIRES_OK_ASYNC(context, batcher.status(), done);
    (*batcher)->Call(context, std::move(done));
  }
};

class DynamicBatcherCloseOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const absl::StatusOr<Batcher*> batcher = FindBatcher(context);
    OP_REQUIRES_OK(context, batcher.status());
    (*batcher)->Close();
  }
};

absl::Status OutputShapes(InferenceContext* context) {
  std::vector<tensorflow::PartialTensorShape> shapes;
  TF_RETURN_IF_ERROR(context->GetAttr("output_shapes", &shapes));
  for (size_t i = 0; i < shapes.size(); ++i) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(context->MakeShapeFromPartialTensorShape(shapes[i], &shape));
    context->set_output(i, shape);
  }
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("DynamicBatcher")
    .Input("captured: Tcaptured")
    .Output("handle: resource")
    .Attr("f: func")
    .Attr("label: string")
    .Attr("input_names: list(string) >= 1")
    .Attr("input_types: list(type) >= 1")
    .Attr("row_shapes: list(shape) >= 1")
    .Attr("num_outputs: int >= 0")
    .Attr("Tcaptured: list(type) >= 0")
    .Attr("minimum_batch_size: int")
    .Attr("maximum_batch_size: int")
    .Attr("timeout_ms: int")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape)
    .Doc(R"doc(
Makes a batcher for `f`, whose inputs are batches of `row_shapes` followed by `captured`.

It is closed when the last copy of `handle` goes away. A negative `timeout_ms` stands for none.
)doc");

// The op only passes captured variables on to a multi-device function. Without the exemption
// TensorFlow would place the op on their device, which may have no kernel for it.
namespace input_colocation_exemption_registration =  // The macro uses the unqualified name.
    tensorflow::input_colocation_exemption_registration;
REGISTER_INPUT_COLOCATION_EXEMPTION("DynamicBatcher");

// Stateful, lest TensorFlow merge two calls with the same rows into one. `let_calls_meet` in
// private_tensorflow.py undoes the other effects of that on a tf.function.
REGISTER_OP("DynamicBatch")
    .Input("handle: resource")
    .Input("rows: Tin")
    .Output("results: Tout")
    .Attr("Tin: list(type) >= 1")
    .Attr("Tout: list(type) >= 0")
    .Attr("output_shapes: list(shape) >= 0")
    .SetIsStateful()
    .SetShapeFn(OutputShapes)
    .Doc("Computes `rows`, one row each, together with those of concurrent calls.");

REGISTER_OP("DynamicBatcherClose")
    .Input("handle: resource")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc("Fails waiting and future calls with CancelledError.");

REGISTER_KERNEL_BUILDER(Name("DynamicBatcher").Device(tensorflow::DEVICE_CPU), DynamicBatcherOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatch").Device(tensorflow::DEVICE_CPU), DynamicBatchOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatcherClose").Device(tensorflow::DEVICE_CPU),
                        DynamicBatcherCloseOp);

}  // namespace dynamic_batching
