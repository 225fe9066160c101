//! A PTX emulator: executes `sm_90a` PTX warp by warp on any machine, and reports what hardware would hide.
//!
//! The order of work is always the same: make a [`Gpu`], [load](Gpu::load) an image, [allocate](Gpu::alloc) buffers, encode
//! [tensor maps](Gpu::encode_tensor_map), [launch](Gpu::launch). A launch returns [`Stats`] or a [`Report`] that names the fault, the
//! block, the thread, the PTX line and, where the image has line information, the source line.
//!
//! ```
//! use ptx_emulator::{Gpu, Launch, Options};
//!
//! let ptx = r"
//! .version 8.4
//! .target sm_90a
//! .address_size 64
//! .visible .entry add_one(.param .u64 p) {
//!     .reg .b32 %r<3>; .reg .b64 %rd<4>;
//!     ld.param.u64 %rd1, [p];
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd2, %r1, 4;
//!     add.s64 %rd3, %rd1, %rd2;
//!     ld.global.u32 %r2, [%rd3];
//!     add.u32 %r2, %r2, 1;
//!     st.global.u32 [%rd3], %r2;
//!     ret;
//! }";
//! let mut gpu = Gpu::new(Options::default());
//! let module = gpu.load("add_one.ptx", ptx)?;
//! let kernel = module.kernel("add_one")?;
//! let buffer = gpu.alloc(32 * 4)?;
//! gpu.write(buffer, &[0; 128])?;
//! gpu.launch(&kernel, &Launch { grid: [1, 1, 1], block: [32, 1, 1], params: &buffer.to_le_bytes(), ..Launch::default() })?;
//! let mut out = [0; 128];
//! gpu.read(buffer, &mut out)?;
//! assert_eq!(out[..4], 1u32.to_le_bytes());
//!
//! // One thread too many: the report says where.
//! let launch = Launch { grid: [1, 1, 1], block: [33, 1, 1], params: &buffer.to_le_bytes(), ..Launch::default() };
//! let report = gpu.launch(&kernel, &launch).unwrap_err();
//! assert_eq!(report.message, "out-of-bounds 4-byte read at global buffer of 128 bytes, offset 128");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it is built
//!
//! | module | what it is |
//! |---|---|
//! | `front` | lexer, parser and lowering: text to dense instructions; refuses what it does not know |
//! | `isa` | one file per instruction family: its syntax (lowering) beside its meaning (execution) |
//! | `machine` | warps, blocks, clusters, the scheduler, mbarriers, the asynchronous engines |
//! | `memory` | global buffers, shared windows, local frames, bounds and initialisation state |
//! | `num` | floating-point formats and directed rounding |
//! | `race` | vector clocks and access cells |
//! | `tensor_map` | the encoder of tensor maps, with the driver's refusals |
//! | `report` | what a failed launch returns |
#![deny(missing_docs)]
#![deny(unsafe_code)]
// Lane loops index several arrays at once, and instructions have many operands.
#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

mod error;
mod front;
mod gpu;
mod isa;
mod machine;
mod memory;
mod module;
mod num;
mod options;
mod race;
mod report;
mod tensor_map;

pub use error::{LaunchError, LoadError, MemoryError};
pub use gpu::{BufferTraffic, Gpu, Launch, Stats};
pub use module::{Kernel, Module};
pub use options::{Detector, Detectors, Options, Schedule, TmaCompletion};
pub use report::{Fault, Place, Report};
pub use tensor_map::{ElementType, Interleave, L2Promotion, OobFill, Swizzle, TensorMap, TensorMapDesc, TensorMapError};
