//! `repack` against its oracle, bit for bit, on every device there is, and what it must refuse.

use dropless::{DType, Error, ExpertWeights, QuantizedRows, Rows, RowsMut, Stream, Tiles, repack};
use dropless_kit::device;
use dropless_kit::guard::{Guarded, POISONS};

use crate::grouped_gemm_quantized::{Kind, Quantized, Scales, int4};
use crate::oracle;

/// Codes, scales and zero points in tiles, over poison, which stays between the rows.
fn repacked(stream: &Stream, w: ExpertWeights<'_>) -> [Vec<u8>; 3] {
    let tiles = Tiles::of(&w).unwrap();
    let output = |[rows, bytes]: [usize; 2]| Guarded::<u8>::new(stream, rows, bytes, 16, POISONS[1]);
    let (mut codes, mut scales, mut zeros) = (output(tiles.codes()), output(tiles.scales()), tiles.zeros().map(output));
    repack::repack(stream, w, &mut codes.view_mut(), &mut scales.view_mut(), zeros.as_mut().map(|zeros| zeros.view_mut()).as_mut())
        .unwrap();
    [codes.take(stream), scales.take(stream), zeros.map_or_else(Vec::new, |zeros| zeros.take(stream))]
}

/// What the oracle gives: output n is row `row(n)` of the checkpoint.
fn want(w: &Quantized, row: impl Fn(usize) -> usize, n: usize) -> [Vec<u8>; 3] {
    let Quantized { kind, experts, k, codes, scales, zeros, .. } = w;
    let (row_bytes, rows) = (codes.len() / (experts * w.n), (0..*experts).map(|e| move |i: usize| e * w.n + i));
    let is_mxfp4 = *kind == Kind::Mxfp4;
    let panels = n.div_ceil(32);
    let (mut all_codes, mut all_scales, mut all_zeros) = (Vec::new(), Vec::new(), Vec::new());
    for of_expert in rows {
        let nibble = |i: usize, k: usize| codes[of_expert(row(i)) * row_bytes + k / 2] >> (4 * (k % 2)) & 15;
        all_codes.extend(oracle::repack::tiles(nibble, n, *k, is_mxfp4));
        for panel in 0..panels {
            let outputs = (32 * panel..32 * panel + 32).map(|i| (i < n).then(|| of_expert(row(i))));
            let outputs: Vec<Option<usize>> = outputs.collect();
            match (scales, *kind) {
                (Scales::E8m0(exponents), _) => {
                    let of = |output: Option<usize>| output.map_or(&[][..], |row| &exponents[row * k / 32..(row + 1) * k / 32]);
                    let largest = |output: Option<usize>| of(output).iter().copied().max().unwrap_or(0);
                    for output in &outputs {
                        let factor = if largest(*output) == 255 { f32::NAN } else { 2f32.powi(i32::from(largest(*output)) - 127) };
                        all_scales.extend(factor.to_le_bytes());
                    }
                    for group in (0..k.div_ceil(64)).map(|step| 2 * step) {
                        for (output, group) in outputs.iter().flat_map(|output| [(output, group), (output, group + 1)]) {
                            let exponent =
                                of(*output).get(group).map_or(0, |exponent| i32::from(*exponent) - i32::from(largest(*output)) + 253);
                            all_scales.push(exponent.max(0) as u8);
                        }
                    }
                }
                (_, Kind::Int4 { group, .. }) => {
                    let (groups, whole) = (k.div_ceil(group), k.next_multiple_of(64));
                    let all_groups = if groups == 1 { 1 } else { whole.div_ceil(group) };
                    for (group, output) in (0..all_groups).flat_map(|group| outputs.iter().map(move |output| (group, *output))) {
                        let at = output.filter(|_| group < groups).map(|row| row * groups + group);
                        match scales {
                            Scales::F32(scales) => all_scales.extend(at.map_or(0.0, |at| scales[at]).to_le_bytes()),
                            Scales::Bf16(scales) => all_scales.extend(at.map_or(0, |at| scales[at].0).to_le_bytes()),
                            Scales::F16(scales) => all_scales.extend(at.map_or(0, |at| scales[at].0).to_le_bytes()),
                            Scales::E8m0(_) => unreachable!("int4 has numbers"),
                        }
                        if let Some(zeros) = zeros {
                            let zero = output.filter(|_| group < groups).map(|row| {
                                let byte = zeros[(row / 8 * groups + group) * 4 + row % 8 / 2];
                                byte >> (4 * (row % 2)) & 15
                            });
                            all_zeros.push(zero.unwrap_or(0));
                        }
                    }
                }
                _ => unreachable!("no tiles"),
            }
        }
    }
    [all_codes, all_scales, all_zeros]
}

#[test]
fn every_byte_against_oracle() {
    let kinds = [int4(32, DType::Bf16, true), int4(64, DType::F32, false), int4(usize::MAX, DType::F16, true), Kind::Mxfp4];
    for kind in kinds {
        for (experts, n, k) in [(1, 8, 32), (2, 64, 128), (3, 40, 160), (2, 72, 96)] {
            let w = Quantized::new(1, kind, experts, n, k, false);
            let w = if kind == Kind::Mxfp4 { w.with_exponents(2, 0..=255) } else { w };
            device::each_device(|stream| {
                w.rows(stream, |rows| {
                    let all = ExpertWeights::nk(rows, experts).unwrap();
                    assert_eq!(repacked(stream, all), want(&w, |i| i, n), "{kind:?} {experts} {n} {k}");
                    let ([first, second], [even, odd]) = (all.halves().unwrap(), all.interleaved().unwrap());
                    assert_eq!(repacked(stream, first), want(&w, |i| i, n / 2));
                    assert_eq!(repacked(stream, second), want(&w, |i| i + n / 2, n / 2));
                    assert_eq!(repacked(stream, even), want(&w, |i| 2 * i, n / 2));
                    assert_eq!(repacked(stream, odd), want(&w, |i| 2 * i + 1, n / 2));
                });
            });
        }
    }
}

/// Outputs of other sizes, zero points where there are none, and formats and groups that have no tiles.
#[test]
fn refusals_name_what_is_wrong() {
    let stream = device::cpu(1);
    let text = |result: Result<(), Error>| result.unwrap_err().to_string();
    let mut bytes = [vec![0u8; 1024], vec![0u8; 192], vec![0u8; 64]];
    let mut run = |w: &Quantized, dims: [[usize; 2]; 2], with_zeros: bool| {
        let [codes, scales, zeros] = &mut bytes;
        let mut codes = RowsMut::from_slice(codes, dims[0][0], dims[0][1]).unwrap();
        let mut scales = RowsMut::from_slice(scales, dims[1][0], dims[1][1]).unwrap();
        let mut zeros = with_zeros.then(|| RowsMut::from_slice(zeros, 1, 64).unwrap());
        w.rows(&stream, |rows| repack::repack(&stream, ExpertWeights::nk(rows, 1)?, &mut codes, &mut scales, zeros.as_mut()))
    };
    let w = Quantized::new(1, int4(32, DType::Bf16, false), 1, 32, 64, false);
    let (codes, scales) = ([1, 1024], [1, 128]);
    run(&w, [codes, scales], false).unwrap();
    assert_eq!(text(run(&w, [[1, 512], scales], false)), "repack: `codes` must be [panels, bytes] = [1, 1024], got [1, 512]");
    assert_eq!(text(run(&w, [codes, [2, 64]], false)), "repack: `scales` must be [panels, bytes] = [1, 128], got [2, 64]");
    assert_eq!(text(run(&w, [codes, scales], true)), "repack: `zeros` must be none, got zero points");
    let w = Quantized::new(1, int4(32, DType::Bf16, true), 1, 32, 64, false);
    assert_eq!(text(run(&w, [codes, scales], false)), "repack: `zeros` must be zero points, got none");
    run(&w, [codes, scales], true).unwrap();
    let w = Quantized::new(1, int4(40, DType::Bf16, false), 1, 32, 64, false);
    let wanted = "repack: groups of 40 is not supported here; supported: multiples of 32, or all of K";
    assert_eq!(text(run(&w, [codes, scales], false)), wanted);
    let w = Quantized::new(1, Kind::E4m3 { block: [1, 64], scales: DType::F32 }, 1, 32, 64, false);
    assert_eq!(text(run(&w, [codes, scales], false)), "repack: `w` of type e4m3 is not supported here; supported: int4, mxfp4");
    let floats = [0.0f32; 64];
    let floats = ExpertWeights::nk(Rows::from_slice(&floats, 1, 64).unwrap(), 1).unwrap();
    assert_eq!(Tiles::of(&floats).unwrap_err().to_string(), "repack: `w` of type f32 is not supported here; supported: int4, mxfp4");
}

/// Weights in tiles are no rows: calls that read rows refuse them. Tiles of other sizes are refused, too.
#[test]
fn tiles_are_no_rows() {
    let w = Quantized::new(1, Kind::Mxfp4, 2, 32, 64, false);
    let stream = device::cpu(1);
    w.on(&stream, |tiled| {
        let text = Tiles::of(&tiled).unwrap_err().to_string();
        assert_eq!(text, "repack: `w` in tiles is not supported here; supported: weights in the order of a checkpoint");
    });
    w.rows(&stream, |rows| {
        let tiles = Tiles::of(&ExpertWeights::nk(rows, 2).unwrap()).unwrap();
        assert_eq!((tiles.codes(), tiles.scales(), tiles.zeros(), tiles.num_experts()), ([2, 1024], [2, 192], None, 2));
        let bytes = [0u8; 2048];
        let view = |rows, cols| Rows::from_slice(&bytes, rows, cols).unwrap();
        let all = QuantizedRows::tiles(tiles, view(2, 1024), view(2, 192), None).unwrap();
        assert_eq!((all.dims(), all.in_tiles()), ([64, 64], Some(tiles)));
        assert!(ExpertWeights::nk(all, 2).is_ok() && ExpertWeights::nk(all, 4).is_err());
        let wanted = "expert_weights: `weights` in tiles is not supported here; supported: weights in the order of a checkpoint";
        assert_eq!(all.dequantize(0, &mut [0.0; 64]).unwrap_err().to_string(), wanted);
        assert_eq!(all.check_scales().unwrap_err().to_string(), wanted);
        assert!(all.row_range(0..65).is_err() && all.row_range(3..4).is_ok());
        assert!(QuantizedRows::tiles(tiles, view(2, 1000), view(2, 192), None).is_err());
        assert!(QuantizedRows::tiles(tiles, view(2, 1024), view(2, 128), None).is_err());
        assert!(QuantizedRows::tiles(tiles, view(2, 1024), view(2, 192), Some(view(2, 64))).is_err());
    });
}
