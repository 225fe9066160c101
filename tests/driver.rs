//! NVIDIA's library as a machine may have it: too old, incomplete, without a device, with another one. A library of its name and with
//! its functions, made by the machine's C compiler, stands in for it; device memory is memory of the host there, and nothing is computed.
#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dropless::device::driver::Driver;
use dropless::device::driver::hardware::Hardware;
use dropless::{Buffer, Device, Error, Stream, sample};
use dropless_kit::goldens::root;

/// What the library answers.
struct Answers {
    version: u32,
    init: u32,
    devices: u32,
    major: u32,
    /// A function that it lacks.
    without: &'static str,
    /// What it refuses of machine code, of PTX, and of launches.
    cubin: u32,
    ptx: u32,
    launch: u32,
}

const GOOD: Answers = Answers { version: 12040, init: 0, devices: 1, major: 9, without: "", cubin: 0, ptx: 0, launch: 0 };

const FUNCTIONS: &str = r#"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int* count) { *count = DEVICES; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int len, int device) { strncpy(name, STANDIN, len); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = attribute == 75 ? MAJOR : attribute == 76 ? 0 : 4; return 0; }
/* The caller has another context current on each thread; work runs in the primary one. */
static char primary, other;
static __thread void* current = &other;
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &primary; return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuStreamGetCtx(void* stream, void** context) { *context = (uint64_t)stream == 0x999 ? &other : &primary; return 0; }
/* Somebody captures all the time: what may wait or allocate is refused, unless the thread says that it concerns no capture. */
static __thread int mode;
#define BESIDE if (mode != 2) return 900
int cuThreadExchangeStreamCaptureMode(int* exchanged) { int before = mode; mode = *exchanged; *exchanged = before; return 0; }
int cuStreamIsCapturing(void* stream, int* status) { *status = (uint64_t)stream == 0x998; return 0; }
int cuStreamSynchronize(void* stream) { BESIDE; return 0; }
int cuStreamDestroy_v2(void* stream) { BESIDE; return 0; }
int cuStreamCreate(void** stream, unsigned flags) { BESIDE; *stream = malloc(1); return 0; }
int cuEventCreate(void** event, unsigned flags) { *event = malloc(1); return 0; }
int cuEventQuery(void* event) { BESIDE; return 600; }
int cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) { BESIDE; if (current != &primary) return 201; *address = (uint64_t)malloc(bytes); return 0; }
int cuMemFreeAsync(uint64_t address, void* stream) { BESIDE; free((void*)address); return 0; }
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void* stream) { memset((void*)address, value, bytes); return 0; }
int cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) { BESIDE; *memory = malloc(bytes); return 0; }
int cuMemFreeHost(void* memory) { BESIDE; free(memory); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) { memcpy((void*)to, from, bytes); return 0; }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) { BESIDE; memcpy(to, (void*)from, bytes); return 0; }
/* The names of the codes, as the driver gives them. */
int cuGetErrorName(int code, const char** name) {
  static char names[8][32];
  static int next;
  sprintf(names[next % 8], STANDIN_NAME, code);
  *name = names[next++ % 8];
  return 0;
}
/* Option 5 is the buffer of the compiler's errors, 6 its size. */
int cuModuleLoadDataEx(void** module, const char* image, unsigned options, const int* names, void** values) {
  BESIDE;
  int code = memcmp(image, ELF, 4) ? PTX : CUBIN;
  *module = malloc(1);
  if (code && options == 2 && names[0] == 5 && names[1] == 6)
    strncpy(values[0], image[0] == 127 ? "" : LOG, (size_t)values[1]);
  return code;
}
int cuModuleGetFunction(void** function, void* module, const char* name) { BESIDE; *function = malloc(1); return 0; }
/* Parameters come as one pointer each. Through `extra` the driver would want the sizes and offsets of the image's own layout. */
int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
  if (extra || !params || !params[0]) return 701;
  if (mode) return 900;
  if (current != &primary) return 201;
  return LAUNCH;
}
int cuMemGetInfo_v2(size_t* available, size_t* total) { *available = 1000; *total = 2000; return 0; }
"#;

/// The library's source: the functions above, and every other one that this crate asks for, which succeeds.
fn source(answers: &Answers) -> String {
    let asked = std::fs::read_to_string(root().join("src/device/driver/hardware.rs")).unwrap();
    let names: Vec<&str> =
        asked.lines().filter_map(|line| line.trim().split_once(" = \"cu")?.1.split_once("\": fn(")).map(|(name, _)| name).collect();
    assert!(names.len() > 30, "{names:?}");
    let Answers { version, init, devices, major, without, cubin, ptx, launch } = answers;
    let macros = [("VERSION", version), ("INIT", init), ("DEVICES", devices), ("MAJOR", major)];
    let macros = macros.into_iter().chain([("CUBIN", cubin), ("PTX", ptx), ("LAUNCH", launch)]);
    let defined = macros.map(|(name, value)| format!("#define {name} {value}\n")).collect::<String>();
    let texts = [("STANDIN", "stand-in"), ("STANDIN_NAME", "NAME_OF_%d"), ("LOG", "line 7: fatal"), ("ELF", "\\177ELF")];
    let texts = texts.map(|(name, text)| format!("#define {name} \"{text}\"\n")).concat();
    let functions = defined + &texts + FUNCTIONS;
    let others = names.iter().filter(|name| !functions.contains(&format!("int cu{name}(")) && format!("cu{name}") != *without);
    others.fold(functions.clone(), |source, name| source + &format!("int cu{name}(void) {{ return 0; }}\n"))
}

/// What opening the device gives where the library answers so; `None` where there is no compiler.
fn opened(answers: &Answers, images: Option<&Path>) -> Option<String> {
    let folder = std::env::temp_dir().join(format!("dropless-driver-{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::create_dir_all(&folder).unwrap();
    let library: PathBuf = folder.join("libcuda.so.1");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let spawned =
        Command::new(&compiler).args(["-shared", "-fPIC", "-x", "c", "-w", "-", "-o"]).arg(&library).stdin(Stdio::piped()).spawn();
    let Ok(mut child) = spawned else {
        let _ = writeln!(std::io::stderr(), "NOT TRIED with other drivers: {compiler} cannot be run");
        return None;
    };
    child.stdin.take().unwrap().write_all(source(answers).as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "open_and_say", "--ignored", "--nocapture"]).env("LD_LIBRARY_PATH", &folder);
    match images {
        Some(images) => again.env("DROPLESS_IMAGES", images),
        None => again.env_remove("DROPLESS_IMAGES"),
    };
    let output = again.output().unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let said = text.split_once("opened: ").unwrap_or_else(|| panic!("{text}")).1;
    Some(said.lines().next().unwrap().to_owned())
}

#[test]
fn any_driver_is_answered_with_an_error_or_a_device() {
    for (answers, want) in [
        (
            Answers { version: 12020, ..GOOD },
            "the driver supports CUDA 12.2, too old for the images; they need CUDA 12.4, driver R550 or newer",
        ),
        (
            Answers { without: "cuTensorMapEncodeTiled", ..GOOD },
            "the CUDA driver has no function `cuTensorMapEncodeTiled`; it needs CUDA 12.4, driver R550 or newer",
        ),
        (Answers { init: 100, ..GOOD }, "no CUDA device 0; this machine has 0"),
        (Answers { init: 999, ..GOOD }, "the CUDA driver does not start: CUDA 999 (NAME_OF_999)"),
        (
            Answers { init: 802, ..GOOD },
            "the CUDA driver does not start: CUDA 802 (NAME_OF_802); where GPUs are joined by NVSwitch, the fabric manager has to run \
             first (nvidia-fabricmanager)",
        ),
        (
            Answers { init: 803, ..GOOD },
            "the CUDA driver does not start: CUDA 803 (NAME_OF_803); the library and the kernel module are of different versions: \
             reload the module or reboot",
        ),
        (Answers { devices: 0, ..GOOD }, "no CUDA device 0; this machine has 0"),
        (Answers { major: 8, ..GOOD }, "the GPU is sm_80; these kernels need sm_90a (H100, H200)"),
        (Answers { major: 10, ..GOOD }, "the GPU is sm_100; these kernels need sm_90a (H100, H200)"),
        (GOOD, "Device(cuda:0), 1000 bytes free, copied, launched from ptx/sample.sm_90a.cubin"),
        (Answers { cubin: 209, ..GOOD }, "Device(cuda:0), 1000 bytes free, copied, launched from ptx/sample.sm_90a.ptx"),
        (
            Answers { cubin: 209, ptx: 218, ..GOOD },
            "the driver refused ptx/sample.sm_90a.ptx at entry `sample_argmax`: CUDA 218 (NAME_OF_218); line 7: fatal",
        ),
        (Answers { launch: 1, ..GOOD }, "sample: cuLaunchKernelEx gave CUDA 1 (NAME_OF_1)"),
        (
            Answers { launch: 719, ..GOOD },
            "device lost in sample: cuLaunchKernelEx gave CUDA 719 (NAME_OF_719); this process cannot use the device again",
        ),
    ] {
        let Some(said) = opened(&answers, None) else { return };
        assert_eq!(said, want);
    }
}

/// Kernels from a folder instead of those built in, as far as it has them.
#[test]
fn images_may_come_from_a_folder() {
    let images = std::env::temp_dir().join(format!("dropless-images-{}", std::process::id()));
    let ptx = images.join("sample.sm_90a.ptx");
    let Some(said) = opened(&GOOD, Some(&images)) else { return };
    assert_eq!(said, format!("DROPLESS_IMAGES: {} is no folder", images.display()));
    std::fs::create_dir_all(&images).unwrap();
    let launched = |file: &Path| format!("Device(cuda:0), 1000 bytes free, copied, launched from {}", file.display());
    assert_eq!(opened(&GOOD, Some(&images)).unwrap(), launched(Path::new("ptx/sample.sm_90a.cubin")));
    std::fs::copy(root().join("ptx/sample.sm_90a.ptx"), &ptx).unwrap();
    assert_eq!(opened(&GOOD, Some(&images)).unwrap(), launched(&ptx));
    // What is refused is named, and nothing else is loaded instead.
    let refused = opened(&Answers { ptx: 218, ..GOOD }, Some(&images)).unwrap();
    let at = format!("the driver refused {} at entry `sample_argmax`: CUDA 218 (NAME_OF_218); line 7: fatal", ptx.display());
    assert_eq!(refused, at);
    let cubin = ptx.with_extension("cubin");
    std::fs::write(&cubin, b"\x7fELF").unwrap();
    let both = format!("DROPLESS_IMAGES: {} has a .ptx beside it, keep one of them", cubin.display());
    assert_eq!(opened(&GOOD, Some(&images)).unwrap(), both);
    std::fs::remove_file(&ptx).unwrap();
    assert_eq!(opened(&GOOD, Some(&images)).unwrap(), launched(&cubin));
    std::fs::remove_dir_all(images).unwrap();
}

/// Streams of the primary context are taken, of another one not; what is captured is found out.
fn lends(device: &Device) -> Result<(), Error> {
    // SAFETY: they stand for streams, of which this library asks nothing.
    let lent = |handle: usize| unsafe { Stream::from_raw(device, std::ptr::without_provenance_mut(handle)) };
    assert!(matches!(lent(0x999), Err(Error::Context { .. })));
    for (handle, captures) in [(0, false), (0x997, false), (0x998, true)] {
        let stream = lent(handle)?;
        let refused = matches!(stream.synchronize(), Err(Error::Unsupported { .. }));
        assert_eq!((stream.as_raw().map(|raw| raw.addr()), refused), (Some(handle), captures));
    }
    Ok(())
}

#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn open_and_say() {
    let said = || -> Result<String, Error> {
        let device = Device::cuda(0)?;
        let stream = device.stream()?;
        // No event is ever done here, so that no block is used twice before the stream is waited for.
        let buffers: Vec<_> = (0..20).map(|i: u32| Buffer::from_slice(&stream, &vec![i; 1 << 20])).collect::<Result<_, _>>()?;
        for (i, buffer) in (0..).zip(&buffers) {
            assert_eq!(buffer.to_vec(&stream)?, vec![i; 1 << 20]);
        }
        let (logits, mut ids) = (Buffer::<f32>::zeros(&stream, 8)?, Buffer::zeros(&stream, 2)?);
        sample::argmax(&stream, logits.rows(2, 4)?, &mut ids)?;
        lends(&device)?;
        // The caller's context is current again.
        assert!(Hardware::shared()?.make_current(0).unwrap().is_some());
        let (free, images) = (device.free_bytes()?.unwrap_or(0), device.loaded_images().join(", "));
        Ok(format!("{device:?}, {free} bytes free, copied, launched from {images}"))
    };
    println!("opened: {}", said().unwrap_or_else(|error| error.to_string()));
}
