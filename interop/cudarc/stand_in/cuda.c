// A stand-in for NVIDIA's driver library, for the order of work: device memory is host memory, and a stream
// is a list of what is still to be done, which is done as late as its waits allow, or as early
// (STAND_IN_EARLY=1). Work that no event puts behind other work then reads what is not written yet, or what
// was freed already. Of the kernels it knows glu_f32; others do nothing.
//
//   cc -shared -fPIC -O2 -Wl,-soname,libcuda.so.1 -o libcuda.so.1 cuda.c -lm -lpthread
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Code;
typedef uint64_t Address;

enum { OK = 0, INVALID_DEVICE = 101, NOT_READY = 600 };
enum Kind { FILL, COPY, POISON, FREE_HOST, RECORD, WAIT, GLU };

// As in cuda/common/params.h.
struct GluParams {
  const float *gate, *up;
  float* y;
  int64_t rows, d_ffn, gate_stride, up_stride, y_stride;
};

struct Record {
  struct Stream* stream;
  int is_done;
};

struct Event {
  struct Record* last;  // what a wait waits for; NULL before the first
};

struct Work {
  enum Kind kind;
  Address to, from;
  size_t bytes;
  int value;
  struct Record* record;
  struct GluParams glu;
  struct Work* next;
};

struct Stream {
  struct Work *first, *last;
  int is_running, is_capturing, is_destroyed;
  struct Stream* next;
};

static struct Stream default_stream;
static struct Stream* streams = &default_stream;
static char primary_context;
static _Thread_local void* current_context;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static struct Stream* stream_of(void* handle) {
  struct Stream* stream = (uintptr_t)handle > 1 ? handle : &default_stream;
  if (stream->is_destroyed) {
    fprintf(stderr, "a stream is used that was destroyed\n");
    abort();
  }
  return stream;
}

static void run(struct Stream* stream);

// Does the stream's first work; 0 if there is none, or if it waits for a stream that waits for this one.
static int step(struct Stream* stream) {
  struct Work* work = stream->first;
  if (!work) return 0;
  if (work->kind == WAIT && !work->record->is_done) {
    run(work->record->stream);
    if (!work->record->is_done) return 0;
  }
  stream->first = work->next;
  if (!stream->first) stream->last = NULL;
  switch (work->kind) {
    case FILL: memset((void*)work->to, work->value, work->bytes); break;
    case COPY: memcpy((void*)work->to, (void*)work->from, work->bytes); break;
    // Never given out again: whoever still uses it finds other numbers.
    case POISON: memset((void*)work->to, 0x7b, *(size_t*)(work->to - 256)); break;
    case FREE_HOST: free((void*)work->from); break;
    case RECORD: work->record->is_done = 1; break;
    case WAIT: break;
    case GLU: {
      struct GluParams* p = &work->glu;
      for (int64_t row = 0; row < p->rows; row++) {
        for (int64_t col = 0; col < p->d_ffn; col++) {
          float gate = p->gate[row * p->gate_stride + col];
          p->y[row * p->y_stride + col] = gate / (1 + expf(-gate)) * p->up[row * p->up_stride + col];
        }
      }
    }
  }
  free(work);
  return 1;
}

static void run(struct Stream* stream) {
  if (stream->is_running) return;
  stream->is_running = 1;
  while (step(stream)) {}
  stream->is_running = 0;
}

// Before a stream comes to what the caller asks for, the others run as far as they can, where work is to be
// early.
static void others_first(struct Stream* stream) {
  if (!getenv("STAND_IN_EARLY")) return;
  for (struct Stream* other = streams; other; other = other->next) {
    if (other != stream) run(other);
  }
}

static void finish(struct Stream* stream) {
  others_first(stream);
  run(stream);
}

static Code queue(void* handle, struct Work work) {
  struct Stream* stream = stream_of(handle);
  if (stream->is_capturing) return OK;  // recorded, and not run
  struct Work* queued = malloc(sizeof *queued);
  *queued = work;
  queued->next = NULL;
  if (stream->last) stream->last->next = queued; else stream->first = queued;
  stream->last = queued;
  return OK;
}

// One call at a time.
#define LOCKED(...) do { pthread_mutex_lock(&mutex); __VA_ARGS__; pthread_mutex_unlock(&mutex); return OK; } while (0)

Code cuInit(unsigned flags) { return OK; }
Code cuDriverGetVersion(int* version) { *version = 12040; return OK; }
Code cuDeviceGetCount(int* count) { *count = 1; return OK; }
Code cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal ? INVALID_DEVICE : OK; }
Code cuDeviceGetName(char* name, int bytes, int device) { snprintf(name, bytes, "a stand-in"); return OK; }
Code cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 4; break;       // multiprocessors
    case 75: *value = 9; break;       // compute capability
    case 76: *value = 0; break;
    case 97: *value = 232448; break;  // shared memory of a block
    default: *value = 1;              // memory pools
  }
  return OK;
}
Code cuDevicePrimaryCtxRetain(void** context, int device) { *context = &primary_context; return OK; }
Code cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
Code cuCtxGetCurrent(void** context) { *context = current_context; return OK; }
Code cuCtxSetCurrent(void* context) { current_context = context; return OK; }
Code cuCtxSynchronize(void) { LOCKED(for (struct Stream* s = streams; s; s = s->next) run(s)); }
Code cuGetErrorName(int code, const char** name) { *name = "AN_ERROR_OF_THE_STAND_IN"; return OK; }
Code cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

Code cuMemGetInfo_v2(size_t* free, size_t* total) { *free = *total = (size_t)1 << 36; return OK; }
Code cuMemAllocAsync(Address* address, size_t bytes, void* stream) {
  char* memory = aligned_alloc(256, 256 + (bytes + 255) / 256 * 256);
  *(size_t*)memory = bytes;
  memset(memory + 256, 0x55, bytes);
  *address = (Address)memory + 256;
  return OK;
}
Code cuMemFreeAsync(Address address, void* stream) {
  LOCKED(queue(stream, (struct Work){.kind = POISON, .to = address}); others_first(NULL));
}
Code cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
  LOCKED(queue(stream, (struct Work){.kind = FILL, .to = to, .value = value, .bytes = bytes}));
}
Code cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  void* copy = memcpy(malloc(bytes), from, bytes);
  LOCKED(queue(stream, (struct Work){.kind = COPY, .to = to, .from = (Address)copy, .bytes = bytes});
         queue(stream, (struct Work){.kind = FREE_HOST, .from = (Address)copy}));
}
Code cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  LOCKED(queue(stream, (struct Work){.kind = COPY, .to = (Address)to, .from = from, .bytes = bytes}); finish(stream_of(stream)));
}
Code cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
  LOCKED(queue(stream, (struct Work){.kind = COPY, .to = to, .from = from, .bytes = bytes}));
}
Code cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) { *memory = malloc(bytes); return OK; }
Code cuMemFreeHost(void* memory) { free(memory); return OK; }

Code cuStreamGetCtx(void* stream, void** context) { *context = &primary_context; return OK; }
Code cuStreamGetId(void* stream, uint64_t* id) { *id = (uint64_t)stream; return OK; } /* no stream is freed */
Code cuStreamCreate(void** stream, unsigned flags) {
  struct Stream* created = calloc(1, sizeof *created);
  LOCKED(created->next = streams->next; streams->next = created; *stream = created);
}
Code cuStreamDestroy_v2(void* stream) { LOCKED(run(stream_of(stream)); stream_of(stream)->is_destroyed = 1); }
Code cuStreamSynchronize(void* stream) { LOCKED(finish(stream_of(stream))); }
Code cuStreamWaitEvent(void* stream, void* handle, unsigned flags) {
  struct Event* event = handle;
  LOCKED(if (event->last) queue(stream, (struct Work){.kind = WAIT, .record = event->last}));
}
Code cuEventCreate(void** event, unsigned flags) { *event = calloc(1, sizeof(struct Event)); return OK; }
Code cuEventDestroy_v2(void* event) { free(event); return OK; }  // its records stay: queued work may name them
Code cuEventRecord(void* handle, void* stream) {
  struct Event* event = handle;
  struct Record* record = calloc(1, sizeof *record);
  record->stream = stream_of(stream);
  LOCKED(event->last = record; queue(stream, (struct Work){.kind = RECORD, .record = record}); others_first(NULL));
}
Code cuEventQuery(void* handle) {
  struct Event* event = handle;
  return event->last && !event->last->is_done ? NOT_READY : OK;
}
Code cuEventSynchronize(void* handle) {
  struct Event* event = handle;
  LOCKED(if (event->last) run(event->last->stream));
}
Code cuEventElapsedTime(float* milliseconds, void* from, void* to) { *milliseconds = 1; return OK; }

Code cuThreadExchangeStreamCaptureMode(int* mode) { *mode = 0; return OK; }
Code cuStreamIsCapturing(void* stream, int* status) { *status = stream_of(stream)->is_capturing; return OK; }
Code cuStreamBeginCapture_v2(void* stream, int mode) { stream_of(stream)->is_capturing = 1; return OK; }
Code cuStreamEndCapture(void* stream, void** graph) {
  stream_of(stream)->is_capturing = 0;
  *graph = &primary_context;
  return OK;
}
Code cuGraphInstantiateWithFlags(void** instance, void* graph, uint64_t flags) { *instance = graph; return OK; }
Code cuGraphLaunch(void* instance, void* stream) { return OK; }
Code cuGraphDestroy(void* graph) { return OK; }
Code cuGraphExecDestroy(void* instance) { return OK; }

Code cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* names, void** values) {
  *module = &primary_context;
  return OK;
}
Code cuModuleGetFunction(void** function, void* module, const char* name) { *function = strdup(name); return OK; }
Code cuFuncSetAttribute(void* function, int attribute, int value) { return OK; }
Code cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
  void* stream = *(void**)((const char*)config + 32);  // behind grid, block and shared memory
  if (strcmp(function, "glu_f32")) return OK;
  LOCKED(queue(stream, (struct Work){.kind = GLU, .glu = *(struct GluParams*)params[0]}));
}
Code cuTensorMapEncodeTiled(void) { return OK; }
