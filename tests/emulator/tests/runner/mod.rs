//! Launches a case on the emulator: the counterpart of what a hardware launcher does with the same data.

#![allow(dead_code)] // each test binary uses its own part

use crate::cases::{Arg, Case, Element, Swizzle, TensorMap, layout};
use ptx_emulator::{ElementType, Gpu, Interleave, L2Promotion, Launch, Module, OobFill, Options, Report, TensorMapDesc};
use std::path::PathBuf;

/// The folder of kernels and images.
pub fn kernels() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// How many random schedules to run: `EMULATOR_SEEDS`, or this.
pub fn seeds(default: u64) -> u64 {
    std::env::var("EMULATOR_SEEDS").map_or(default, |n| n.parse().expect("EMULATOR_SEEDS is a number"))
}

/// Why a case did not run to its end.
#[derive(Debug)]
pub enum Failure {
    /// Loading, allocating, encoding: before the launch.
    Setup(String),
    Report(Box<Report>),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Setup(text) => f.write_str(text),
            Failure::Report(report) => report.fmt(f),
        }
    }
}

fn setup(error: impl std::fmt::Display) -> Failure {
    Failure::Setup(error.to_string())
}

/// A device with one image loaded, for many launches of it.
pub struct Session {
    gpu: Gpu,
    module: Module,
}

impl Session {
    pub fn new(image: &str, ptx: &str, options: Options) -> Result<Session, Failure> {
        let mut gpu = Gpu::new(options);
        let module = gpu.load(&format!("{image}.ptx"), ptx).map_err(setup)?;
        Ok(Session { gpu, module })
    }

    /// Launches a case and compares; the error is a report or the first disagreement.
    pub fn run(&mut self, case: &Case) -> Result<(), String> {
        let outputs = self.launch(case).map_err(|e| e.to_string())?;
        disagreement(case, &outputs).map_or(Ok(()), Err)
    }

    /// Launches a case and returns the contents of its buffers afterwards, by argument (empty for other arguments).
    pub fn launch(&mut self, case: &Case) -> Result<Vec<Vec<u8>>, Failure> {
        let mut kernel = self.module.kernel(&case.entry).map_err(setup)?;
        kernel.set_max_dynamic_shared(case.shared_bytes).map_err(setup)?;
        let gpu = &mut self.gpu;
        let mut addresses = vec![0; case.args.len()];
        for (i, arg) in case.args.iter().enumerate() {
            if let Arg::Buffer { before, .. } = arg {
                addresses[i] = gpu.alloc(before.len() as u64).map_err(setup)?;
                gpu.write(addresses[i], before).map_err(setup)?;
            }
        }
        let (offsets, size) = layout(case);
        let mut params = vec![0; size];
        for (i, arg) in case.args[..case.params].iter().enumerate() {
            let bytes = match arg {
                Arg::U8(value) => vec![*value],
                Arg::U16(value) => value.to_le_bytes().to_vec(),
                Arg::U32(value) => value.to_le_bytes().to_vec(),
                Arg::U64(value) => value.to_le_bytes().to_vec(),
                Arg::Buffer { .. } => addresses[i].to_le_bytes().to_vec(),
                Arg::Map(map) => encode(gpu, map, addresses[map.of]).map_err(setup)?.to_vec(),
            };
            params[offsets[i]..offsets[i] + bytes.len()].copy_from_slice(&bytes);
        }
        let launch = Launch {
            grid: case.grid,
            block: case.block,
            cluster: (case.cluster != [1, 1, 1]).then_some(case.cluster),
            shared_bytes: case.shared_bytes,
            params: &params,
        };
        gpu.launch(&kernel, &launch).map_err(Failure::Report)?;
        let mut outputs = vec![Vec::new(); case.args.len()];
        for (i, arg) in case.args.iter().enumerate() {
            if let Arg::Buffer { before, .. } = arg {
                outputs[i] = vec![0; before.len()];
                gpu.read(addresses[i], &mut outputs[i]).map_err(setup)?;
                gpu.free(addresses[i]).map_err(setup)?;
            }
        }
        Ok(outputs)
    }
}

/// Runs one case on a device of its own.
pub fn run(case: &Case, ptx: &str, options: Options) -> Result<(), String> {
    Session::new(case.image, ptx, options).map_err(|e| e.to_string())?.run(case)
}

/// Launches one case on a device of its own.
pub fn launch(case: &Case, ptx: &str, options: Options) -> Result<Vec<Vec<u8>>, Failure> {
    Session::new(case.image, ptx, options)?.launch(case)
}

/// The first difference between what a launch left and what it should have left.
pub fn disagreement(case: &Case, outputs: &[Vec<u8>]) -> Option<String> {
    outputs.iter().enumerate().find_map(|(i, got)| case.verdict(i, got).map(|difference| format!("argument {i}: {difference}")))
}

/// Encodes a case's tensor map over the buffer at `address`.
pub fn encode(gpu: &Gpu, map: &TensorMap, address: u64) -> Result<[u8; 128], String> {
    let desc = TensorMapDesc {
        element: match map.element {
            Element::U8 => ElementType::U8,
            Element::U16 => ElementType::U16,
            Element::U32 => ElementType::U32,
            Element::F16 => ElementType::F16,
            Element::Bf16 => ElementType::Bf16,
            Element::F32 => ElementType::F32,
        },
        address,
        dims: &map.dims,
        strides: &map.strides,
        box_dims: &map.tile,
        element_strides: &[],
        interleave: Interleave::None,
        swizzle: match map.swizzle {
            Swizzle::None => ptx_emulator::Swizzle::None,
            Swizzle::B32 => ptx_emulator::Swizzle::B32,
            Swizzle::B64 => ptx_emulator::Swizzle::B64,
            Swizzle::B128 => ptx_emulator::Swizzle::B128,
        },
        l2_promotion: L2Promotion::None,
        oob_fill: OobFill::Zeros,
    };
    gpu.encode_tensor_map(&desc).map(|map| map.0).map_err(|e| e.to_string())
}
