// The actor's end of the shared-memory batcher, as a Python type without TensorFlow.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstring>

#include "shared_segment.h"

namespace dynamic_batching {
namespace {

PyObject* closed_error = nullptr;

struct ActorClient {
  PyObject_HEAD
  void* segment;
  uint64_t segment_bytes;
  SegmentHeader* header;
  ActorBlock* block;
  float episode_return;
  int32_t episode_step;
  uint64_t returned_at;  // When Python was given its last action; 0 before the first.
};

// Sleeping actors look this often whether the segment was closed without waking them.
constexpr uint64_t kCheckClosedNanoseconds = 1000000000;

void WaitForAnswer(ActorClient* self) {
  ActorBlock* block = self->block;
  while (!self->header->closed.load(std::memory_order_acquire)) {
    uint32_t state = kRequested;
    // Only an actor that has said it sleeps costs the batcher a system call.
    if (!block->state.compare_exchange_strong(state, kSleeping) && state == kAnswered) return;
    FutexWait(&block->state, kSleeping, kCheckClosedNanoseconds);
    if (block->state.load(std::memory_order_acquire) == kAnswered) return;
  }
}

// Writes one row and returns the action that answers it.
PyObject* Request(ActorClient* self, float reward, int end, PyObject* observation) {
  SegmentHeader* header = self->header;
  ActorBlock* block = self->block;
  const uint32_t unroll = block->unroll;
  const uint32_t row = block->row;
  const int num_observations = header->num_fields - kFirstObservation;
  if (!PyTuple_Check(observation) || PyTuple_GET_SIZE(observation) != num_observations) {
    return PyErr_Format(PyExc_ValueError, "observation must be a tuple of %d arrays",
                        num_observations);
  }
  if (header->closed.load(std::memory_order_acquire)) {
    PyErr_SetString(closed_error, "the batcher is closed");
    return nullptr;
  }
  for (int i = 0; i < num_observations; ++i) {
    const int field = kFirstObservation + i;
    Py_buffer buffer;
    if (PyObject_GetBuffer(PyTuple_GET_ITEM(observation, i), &buffer, PyBUF_C_CONTIGUOUS) != 0) {
      return nullptr;
    }
    const Py_ssize_t expected = header->fields[field].row_bytes;
    if (buffer.len != expected) {
      PyErr_Format(PyExc_ValueError, "observation %d has %zd bytes, its spec has %zd", i,
                   buffer.len, expected);
      PyBuffer_Release(&buffer);
      return nullptr;
    }
    memcpy(GetRow(self->segment, unroll, field, row), buffer.buf, buffer.len);
    PyBuffer_Release(&buffer);
  }
  const uint8_t end_byte = end;
  memcpy(GetRow(self->segment, unroll, kReward, row), &reward, sizeof(reward));
  memcpy(GetRow(self->segment, unroll, kEpisodeReturn, row), &self->episode_return,
         sizeof(self->episode_return));
  memcpy(GetRow(self->segment, unroll, kEpisodeStep, row), &self->episode_step,
         sizeof(self->episode_step));
  memcpy(GetRow(self->segment, unroll, kEnd, row), &end_byte, sizeof(end_byte));

  const uint64_t requested_at = NowNanoseconds();
  if (self->returned_at != 0) {
    block->environment_nanoseconds.store(
        block->environment_nanoseconds.load(std::memory_order_relaxed) + requested_at -
            self->returned_at,
        std::memory_order_relaxed);
  }
  Py_BEGIN_ALLOW_THREADS;
  block->state.store(kRequested);
  const uint32_t request = header->doorbell.fetch_add(1) + 1;
  // The batcher wants to hear of this request and of those after it, once each at most: it moves
  // `wake_at` away as soon as it is awake.
  if (static_cast<int32_t>(request - header->wake_at.load()) >= 0) FutexWake(&header->doorbell);
  WaitForAnswer(self);
  Py_END_ALLOW_THREADS;
  self->returned_at = NowNanoseconds();
  block->waiting_nanoseconds.store(block->waiting_nanoseconds.load(std::memory_order_relaxed) +
                                       self->returned_at - requested_at,
                                   std::memory_order_relaxed);
  if (block->state.load(std::memory_order_acquire) != kAnswered) {
    PyErr_SetString(closed_error, "the batcher is closed");
    return nullptr;
  }
  return PyLong_FromLong(block->action);
}

PyObject* Start(PyObject* object, PyObject* args) {
  auto* self = reinterpret_cast<ActorClient*>(object);
  int end;
  PyObject* observation;
  if (!PyArg_ParseTuple(args, "iO", &end, &observation)) return nullptr;
  self->episode_return = 0;
  self->episode_step = 0;
  return Request(self, 0, end, observation);
}

PyObject* Step(PyObject* object, PyObject* const* args, Py_ssize_t num_args) {
  auto* self = reinterpret_cast<ActorClient*>(object);
  if (num_args != 3) {
    PyErr_SetString(PyExc_TypeError, "step takes (reward, end, observation)");
    return nullptr;
  }
  const double reward = PyFloat_AsDouble(args[0]);
  const long end = PyLong_AsLong(args[1]);
  if (PyErr_Occurred()) return nullptr;
  self->episode_return += static_cast<float>(reward);
  self->episode_step += 1;
  PyObject* action = Request(self, static_cast<float>(reward), end, args[2]);
  if (end == kTerminated || end == kTruncated) {
    self->episode_return = 0;
    self->episode_step = 0;
  }
  return action;
}

int Init(PyObject* object, PyObject* args, PyObject* kwargs) {
  auto* self = reinterpret_cast<ActorClient*>(object);
  static const char* names[] = {"fd", "actor", nullptr};
  int fd;
  unsigned int actor;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iI", const_cast<char**>(names), &fd, &actor)) {
    return -1;
  }
  if (self->segment != nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "this client is connected already");
    return -1;
  }
  struct stat status;
  if (fstat(fd, &status) != 0) {
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
  }
  const uint64_t bytes = status.st_size;
  void* segment = bytes < sizeof(SegmentHeader)
                      ? MAP_FAILED
                      : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (segment == MAP_FAILED) {
    PyErr_SetString(PyExc_ValueError, "the file descriptor is no segment of a batcher");
    return -1;
  }
  auto* header = static_cast<SegmentHeader*>(segment);
  if (header->magic != kSegmentMagic || header->segment_bytes != bytes ||
      actor >= header->num_actors) {
    munmap(segment, bytes);
    PyErr_SetString(PyExc_ValueError,
                    "the segment belongs to another build of this project or has no such actor");
    return -1;
  }
  self->segment = segment;
  self->segment_bytes = bytes;
  self->header = header;
  self->block = GetActorBlock(segment, actor);
  return 0;
}

void Dealloc(PyObject* object) {
  auto* self = reinterpret_cast<ActorClient*>(object);
  if (self->segment != nullptr) munmap(self->segment, self->segment_bytes);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"start", Start, METH_VARARGS,
     "start(end, observation) -> action\n\n"
     "Sends the first row of the first episode, with reward 0, and waits for its action.\n"
     "observation is a tuple of C-contiguous arrays in the order of the batcher's spec."},
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Step)), METH_FASTCALL,
     "step(reward, end, observation) -> action\n\n"
     "Sends the row that the last action led to and waits for the next action. end is an\n"
     "EpisodeEnd; the return and the steps of the episode are counted here.\n"
     "Raises ClosedError when the batcher is closed, ValueError for an array of another size."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>(
                    "ActorClient(fd, actor): the actor's end of a shared-memory batcher.\n\n"
                    "fd is the segment's file descriptor; it may be closed afterwards.")},
    {Py_tp_init, reinterpret_cast<void*>(Init)},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Dealloc)},
    {Py_tp_methods, methods},
    {0, nullptr}};

PyType_Spec type_spec = {"dynamic_batching._actor_client.ActorClient", sizeof(ActorClient), 0,
                         Py_TPFLAGS_DEFAULT, slots};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT,
                                 "_actor_client",
                                 "The actor's end of the shared-memory batcher.",
                                 -1,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};

}  // namespace
}  // namespace dynamic_batching

PyMODINIT_FUNC PyInit__actor_client() {
  using dynamic_batching::closed_error;
  PyObject* module = PyModule_Create(&dynamic_batching::module_definition);
  if (module == nullptr) return nullptr;
  PyObject* type = PyType_FromSpec(&dynamic_batching::type_spec);
  closed_error =
      PyErr_NewException("dynamic_batching._actor_client.ClosedError", PyExc_Exception, nullptr);
  if (type == nullptr || closed_error == nullptr ||
      PyModule_AddObjectRef(module, "ActorClient", type) != 0 ||
      PyModule_AddObjectRef(module, "ClosedError", closed_error) != 0) {
    return nullptr;
  }
  Py_DECREF(type);
  return module;
}
