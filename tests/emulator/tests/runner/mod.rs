//! Launches a case on the emulator: the counterpart of what a hardware launcher does with the same data.

#![allow(dead_code)] // each test binary uses its own part

use crate::cases::{Arg, Case, Element, Swizzle, TensorMap, layout};
use ptx_emulator::{ElementType, Gpu, Interleave, L2Promotion, Launch, OobFill, Options, TensorMapDesc};
use std::path::PathBuf;

/// The folder of kernels and images.
pub fn kernels() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Runs one case; the error is a report or the first disagreement.
pub fn run(case: &Case, ptx: &str, options: Options) -> Result<(), String> {
    let mut gpu = Gpu::new(options);
    let module = gpu.load(&format!("{}.ptx", case.image), ptx).map_err(|e| e.to_string())?;
    let mut kernel = module.kernel(&case.entry).map_err(|e| e.to_string())?;
    kernel.set_max_dynamic_shared(case.shared_bytes).map_err(|e| e.to_string())?;

    let mut addresses = vec![0; case.args.len()];
    for (i, arg) in case.args.iter().enumerate() {
        if let Arg::Buffer { before, .. } = arg {
            addresses[i] = gpu.alloc(before.len() as u64).map_err(|e| e.to_string())?;
            gpu.write(addresses[i], before).map_err(|e| e.to_string())?;
        }
    }
    let (offsets, size) = layout(&case.args);
    let mut params = vec![0; size];
    for (i, arg) in case.args.iter().enumerate() {
        let bytes = match arg {
            Arg::U32(value) => value.to_le_bytes().to_vec(),
            Arg::U64(value) => value.to_le_bytes().to_vec(),
            Arg::Buffer { .. } => addresses[i].to_le_bytes().to_vec(),
            Arg::Map(map) => encode(&gpu, map, addresses[map.of])?.to_vec(),
        };
        params[offsets[i]..offsets[i] + bytes.len()].copy_from_slice(&bytes);
    }
    let launch = Launch {
        grid: case.grid,
        block: case.block,
        cluster: Some(case.cluster),
        shared_bytes: case.shared_bytes,
        params: &params,
    };
    gpu.launch(&kernel, &launch).map_err(|report| report.to_string())?;
    for (i, arg) in case.args.iter().enumerate() {
        if let Arg::Buffer { before, .. } = arg {
            let mut got = vec![0; before.len()];
            gpu.read(addresses[i], &mut got).map_err(|e| e.to_string())?;
            if let Some(difference) = case.verdict(i, &got) {
                return Err(format!("argument {i}: {difference}"));
            }
        }
    }
    Ok(())
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
