//! Products of e4m3 against their oracle: at the edges of tiles, with every way that scales lie, and what is
//! refused.

use std::sync::Arc;

use dropless::activation::{Activation, Glu};
use dropless::epilogue::{Bias, Epilogue, GluEpilogue};
use dropless::quantize::{QuantizedInputs, e4m3};
use dropless::{
    Bf16, Buffer, Device, ExpertRows, ExpertWeights, F16, Float, Place, QuantizedRows, Routing, RoutingBuffers, Rows, Stream, WeightRows,
    grouped_gemm,
};
use dropless_kit::compare::{relative_l2, same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options, Schedule, TmaCompletion};
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded, POISONS};

use crate::grouped_gemm::{offsets, owners};
use crate::oracle;

/// Rows per expert around the edges of a tile's 128 rows and a consumer's 64.
const EDGES: [u32; 9] = [0, 1, 63, 64, 65, 127, 128, 129, 300];

/// Operands of a product of e4m3 and what it should give.
#[derive(Clone)]
struct Case {
    sizes: Vec<u32>,
    n: usize,
    k: usize,
    /// Rows and columns of a scale's block of weights.
    block: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<f32>,
    w: Vec<u8>,
    w_scales: Vec<f32>,
}

impl Case {
    /// With `x` and `w` made by functions of a random number, and the scales, too.
    fn new(sizes: &[u32], n: usize, k: usize, code: impl Fn(&mut Random) -> u8, scale: impl Fn(&mut Random) -> f32) -> Case {
        Case::with_block(sizes, n, k, [128, 128], code, scale)
    }

    fn with_block(
        sizes: &[u32],
        n: usize,
        k: usize,
        block: [usize; 2],
        code: impl Fn(&mut Random) -> u8,
        scale: impl Fn(&mut Random) -> f32,
    ) -> Case {
        let (rows, experts, mut random) = (sizes.iter().sum::<u32>() as usize, sizes.len(), Random::new(11));
        let block = [block[0].min(n), block[1].min(k)];
        let w_scales = experts * n.div_ceil(block[0]) * k.div_ceil(block[1]);
        let mut many = |count: usize| (0..count).map(|_| code(&mut random)).collect::<Vec<_>>();
        let (codes, w) = (many(rows * k), many(experts * n * k));
        let mut many = |count: usize| (0..count).map(|_| scale(&mut random)).collect::<Vec<_>>();
        Case { sizes: sizes.to_vec(), n, k, block, codes, scales: many(k.div_ceil(128) * rows), w, w_scales: many(w_scales) }
    }

    /// Small integers times powers of two: sums are exact, so that every index, edge and stage shows.
    fn exact(sizes: &[u32], n: usize, k: usize) -> Case {
        Case::new(
            sizes,
            n,
            k,
            |random| oracle::quantize::code(random.below(9) as f32 - 4.0),
            |random| 2f32.powi(random.below(5) as i32 - 2),
        )
    }

    /// All finite codes, and scales of many sizes, so that sums stay within f16.
    fn random(sizes: &[u32], n: usize, k: usize, block: [usize; 2]) -> Case {
        let code = |random: &mut Random| (random.below(255) as u8).wrapping_add(u8::from(random.below(2) == 1) * 0x80);
        let code = move |random: &mut Random| Some(code(random)).filter(|code| code & 0x7f != 0x7f).unwrap_or(0x7e);
        Case::with_block(sizes, n, k, block, code, |random| (random.unit() + 0.01) as f32 / 16.0)
    }

    fn experts(&self) -> usize {
        self.sizes.len()
    }

    fn rows(&self) -> usize {
        self.sizes.iter().sum::<u32>() as usize
    }

    /// Sums, and the sums of the magnitudes, with the weights' scales rounded to `S`.
    fn want<S: Float>(&self) -> [Vec<f64>; 2] {
        let owner = owners(&offsets(&self.sizes));
        let x = oracle::quantize::numbers(&self.codes, &self.scales, self.k);
        let scales: Vec<f64> = self.w_scales.iter().map(|scale| S::from_f32(*scale).to_f32().into()).collect();
        let each = scales.len() / self.experts();
        let of = |expert: usize| {
            let codes = &self.w[expert * self.n * self.k..][..self.n * self.k];
            oracle::quantize::weights(codes, &scales[expert * each..][..each], self.k, self.block)
        };
        let w: Vec<f64> = (0..self.experts()).flat_map(of).collect();
        oracle::quantize::product(&x, &w, &owner, self.n, self.k)
    }

    /// The operands on a device, the weights' scales rounded to `S`, each expert's in a matrix of its own.
    fn on<S: Float + Bits>(&self, stream: &Stream) -> OnDevice<S> {
        let (rows, experts) = (self.rows(), self.experts());
        let w_scales: Vec<S> = self.w_scales.iter().map(|scale| S::from_f32(*scale)).collect();
        let [scale_rows, scale_cols] = [self.n.div_ceil(self.block[0]), self.k.div_ceil(self.block[1])];
        OnDevice {
            codes: Guarded::with(stream, &self.codes, rows, self.k, 16),
            scales: Guarded::with(stream, &self.scales, self.k.div_ceil(128), rows, 4),
            w: Guarded::with(stream, &self.w, experts * self.n, self.k, 32),
            w_scales: Guarded::with(stream, &w_scales, experts * scale_rows, scale_cols, 3),
            offsets: Buffer::from_slice(stream, &offsets(&self.sizes)).unwrap(),
            sizes: [rows, experts, self.n, scale_rows],
            block: self.block,
        }
    }

    fn run<S: Float + Bits, O: Float + Bits>(&self, stream: &Stream) -> Vec<O> {
        let on = self.on::<S>(stream);
        guard::run::<O>(stream, self.rows(), self.n, |y| {
            on.with_weights(|w| grouped_gemm::linear_quantized(stream, on.x(), w, on.owned(), &Epilogue::default(), y).unwrap());
        })
    }
}

struct OnDevice<S> {
    codes: Guarded<u8>,
    scales: Guarded<f32>,
    w: Guarded<u8>,
    w_scales: Guarded<S>,
    offsets: Buffer<u32>,
    sizes: [usize; 4],
    block: [usize; 2],
}

impl<S: Float + Bits> OnDevice<S> {
    fn x(&self) -> QuantizedInputs<'_> {
        QuantizedInputs::new(self.codes.view(), self.scales.view()).unwrap()
    }

    fn owned(&self) -> ExpertRows<'_> {
        let [rows, experts, ..] = self.sizes;
        // SAFETY: the offsets begin with 0, do not decrease and end with `rows`.
        unsafe { ExpertRows::from_raw(self.offsets.rows(1, experts + 1).unwrap(), rows, rows).unwrap() }
    }

    /// Each expert's matrix apart: blocks of one need not end where the next begins.
    fn with_weights(&self, f: impl FnOnce(ExpertWeights<'_>)) {
        let [_, experts, n, scale_rows] = self.sizes;
        let each: Vec<WeightRows<'_>> = (0..experts)
            .map(|expert| {
                let codes = self.w.view().row_range(expert * n..(expert + 1) * n).unwrap();
                let scales = self.w_scales.view().row_range(expert * scale_rows..(expert + 1) * scale_rows).unwrap();
                QuantizedRows::e4m3(codes, scales, self.block).unwrap().into()
            })
            .collect();
        f(ExpertWeights::nk_each(&each).unwrap());
    }
}

/// Calls `test` on every device, with the share of the sum of magnitudes that its tensor core may lose: 0 on
/// the emulated GPU and on the CPU.
fn each_device(test: impl Fn(&Stream, f64)) {
    let loses = |stream: &Stream| stream.place() != Place::Host && !device::is_emulating();
    device::each_device(|stream| test(stream, if loses(stream) { 2f64.powi(-9) } else { 0.0 }));
}

fn edges(sizes: &[u32], n: usize, k: usize) {
    let case = Case::exact(sizes, n, k);
    let [want, _] = case.want::<f32>();
    each_device(|stream, _| {
        let got = case.run::<f32, f32>(stream);
        let wrong = got.iter().zip(&want).position(|(got, want)| f64::from(*got) != *want);
        assert_eq!(wrong.map(|at| (at / n, at % n, got[at], want[at])), None, "{sizes:?} N={n} K={k}: (row, column, got, want)");
    });
}

#[test]
fn edges_of_rows() {
    edges(&EDGES, 24, 144);
    edges(&[0, 0, 300, 0], 40, 128); // all rows to one
    edges(&[2; 40], 8, 16);
}

/// Columns around the edges of a tile and of its halves, k around those of a stage and of the ring.
#[test]
fn edges_of_columns_and_k() {
    for n in [8, 120, 128, 136, 248, 256, 264, 520] {
        edges(&[3, 66], n, 32);
    }
    for k in [16, 112, 128, 144, 512, 528, 1168] {
        edges(&[66, 1], 72, k);
    }
}

/// More row tiles than a band of the walk holds, and more tiles than blocks.
#[test]
fn many_tiles() {
    edges(&[130, 128 * 17 + 5], 264, 16);
}

fn against_oracle<S: Float + Bits, O: Float + Bits>(block: [usize; 2]) {
    for (sizes, n, k) in [(&[70, 0, 5][..], 136, 208), (&[3, 130], 264, 400)] {
        let case = Case::random(sizes, n, k, block);
        let [want, sums] = case.want::<S>();
        each_device(|stream, lost| {
            within(&case.run::<S, O>(stream), &want, n, |i| sum_bound::<O>(want[i], k, sums[i]) + lost * sums[i]);
        });
    }
}

#[test]
fn rounded_outputs_against_oracle() {
    against_oracle::<f32, Bf16>([128, 128]);
    against_oracle::<f32, F16>([128, 128]);
    against_oracle::<f32, f32>([128, 128]);
}

/// A scale for the tensor, one for each output, and blocks of several tiles; scales of every type.
#[test]
fn every_block_of_scales() {
    against_oracle::<f32, f32>([usize::MAX, usize::MAX]);
    against_oracle::<Bf16, f32>([1, usize::MAX]);
    against_oracle::<F16, Bf16>([128, 128]);
    against_oracle::<Bf16, Bf16>([128, 128]);
    against_oracle::<f32, f32>([256, 128]);
    against_oracle::<Bf16, f32>([128, 256]);
    against_oracle::<f32, F16>([128, usize::MAX]);
}

/// Stacked experts, their halves and their interleaved rows give what matrices of their own give, to the bit.
#[test]
fn stacks_and_halves_are_the_same_matrices() {
    let (sizes, n, k) = ([70, 5], 128, 160);
    for block in [[128, 128], [1, usize::MAX]] {
        let case = Case::random(&sizes, 2 * n, k, block);
        device::each_gpu(|stream| {
            let on = case.on::<f32>(stream);
            let all = case.run::<f32, f32>(stream);
            let stacked = QuantizedRows::e4m3(on.w.view(), on.w_scales.view(), case.block).unwrap();
            let stacked = ExpertWeights::nk(stacked, 2).unwrap();
            let run = |w: ExpertWeights<'_>| {
                guard::run::<f32>(stream, 75, w.n(), |y| {
                    grouped_gemm::linear_quantized(stream, on.x(), w, on.owned(), &Epilogue::default(), y).unwrap();
                })
            };
            same_bits(&run(stacked), &all);
            let columns = |first: usize, step: usize| -> Vec<f32> {
                all.chunks(2 * n).flat_map(|row| row[first..].iter().step_by(step).take(n).copied().collect::<Vec<_>>()).collect()
            };
            for (half, w) in stacked.halves().unwrap().into_iter().enumerate() {
                same_bits(&run(w), &columns(half * n, 1));
            }
            if block[0] == 1 {
                for (odd, w) in stacked.interleaved().unwrap().into_iter().enumerate() {
                    same_bits(&run(w), &columns(odd, 2));
                }
            }
        });
    }
}

/// Both products, their biases and every gate; one output's scales for the up, blocks for the gate.
#[test]
fn gates_and_biases() {
    let (sizes, n, k) = ([70, 0, 133], 136, 272);
    let gate = Case::random(&sizes, n, k, [128, 128]);
    let up = Case { codes: gate.codes.clone(), scales: gate.scales.clone(), ..Case::random(&sizes, n, k, [1, usize::MAX]) };
    let small = |case: &Case| Case { scales: case.scales.iter().map(|scale| scale * 2f32.powi(-9)).collect(), ..case.clone() };
    let (gate, up) = (small(&gate), small(&up));
    let biases = [1, 2].map(|seed| normal::<Bf16>(seed, 3 * n, 1.0));
    let ([gates, gate_sums], [ups, up_sums]) = (gate.want::<f32>(), up.want::<f32>());
    let owner = owners(&offsets(&sizes));
    for (glu, biased) in [(Glu::Silu, false), (Glu::Silu, true), (Glu::GeluTanh, false), (Glu::GPT_OSS, true)] {
        let bias = |which: usize, i: usize| if biased { f64::from(biases[which][owner[i / n] * n + i % n].to_f32()) } else { 0.0 };
        let value = |i: usize| [gates[i] + bias(0, i), ups[i] + bias(1, i)];
        let want: Vec<f64> = (0..gates.len()).map(|i| oracle::activation::glu(value(i)[0], value(i)[1], glu)).collect();
        each_device(|stream, lost| {
            let (gate, up) = (gate.on::<f32>(stream), up.on::<f32>(stream));
            let biases = biases.each_ref().map(|bias| Guarded::with(stream, bias, 3, n, 8));
            let biases = biases.each_ref().map(|bias| Bias::new(bias.view()));
            let epilogue = GluEpilogue::default().with_glu(glu);
            let epilogue = if biased { epilogue.with_biases(biases) } else { epilogue };
            let got = guard::run::<Bf16>(stream, owner.len(), n, |h| {
                gate.with_weights(|gates| {
                    up.with_weights(|ups| {
                        grouped_gemm::glu_quantized(stream, gate.x(), gates, ups, gate.owned(), &epilogue, h).unwrap();
                    });
                });
            });
            // What the sums are off by, through functions whose slopes are at most 1.2 (in gpt-oss 2 at its
            // limit).
            within(&got, &want, n, |i| {
                let [gate, up] = value(i);
                let off = |value: f64, sum: f64| sum_bound::<f32>(value, k + 1, sum + 4.0) + lost * sum;
                let (gate_off, up_off) = (off(gate, gate_sums[i]), off(up, up_sums[i]));
                let slope = 2.0 * (1.0 + gate_off);
                slope * gate_off * (up.abs() + 1.0 + up_off)
                    + (gate.abs() + gate_off) * up_off
                    + sum_bound::<Bf16>(want[i], 40, want[i].abs() + 1e-4)
            });
        });
    }
}

/// An activation and a bias of one product.
#[test]
fn activations_and_biases() {
    let (sizes, n, k) = ([5, 70], 72, 144);
    let case = Case::random(&sizes, n, k, [128, 128]);
    let case = Case { scales: case.scales.iter().map(|scale| scale * 2f32.powi(-9)).collect(), ..case };
    let (bias, owner, [sums, sizes_of]) = (normal::<f32>(1, 2 * n, 1.0), owners(&offsets(&sizes)), case.want::<f32>());
    for activation in [Activation::Identity, Activation::GeluErf, Activation::Scaled(-2.0)] {
        let value = |i: usize| sums[i] + f64::from(bias[owner[i / n] * n + i % n]);
        let want: Vec<f64> = (0..sums.len()).map(|i| oracle::activation::activate(value(i), activation)).collect();
        each_device(|stream, lost| {
            let (on, bias) = (case.on::<f32>(stream), Guarded::with(stream, &bias, 2, n, 8));
            let epilogue = Epilogue::default().with_activation(activation).with_bias(Bias::new(bias.view()));
            let got = guard::run::<f32>(stream, 75, n, |y| {
                on.with_weights(|w| grouped_gemm::linear_quantized(stream, on.x(), w, on.owned(), &epilogue, y).unwrap());
            });
            within(&got, &want, n, |i| {
                2.0 * (sum_bound::<f32>(value(i), k + 1, sizes_of[i] + 4.0) + lost * sizes_of[i]) + 1e-6 * (1.0 + want[i].abs())
            });
        });
    }
}

/// Rows quantised on the device against the product of the rows as they were: each element is off by at most
/// 1/16, or by 2^-10 of its scale, and the sums by much less.
#[test]
fn against_exact_activations() {
    let (sizes, n, k) = ([90, 0, 40], 136, 640);
    let (rows, case) = (130, Case::random(&sizes, n, k, [128, 128]));
    let x = normal::<Bf16>(5, rows * k, 1.0);
    let exact = to_f64(&x);
    each_device(|stream, lost| {
        let on = case.on::<f32>(stream);
        let x = Guarded::with(stream, &x, rows, k, 8);
        let (mut codes, mut scales) = (Buffer::<u8>::zeros(stream, rows * k).unwrap(), Buffer::<f32>::zeros(stream, 5 * 132).unwrap());
        let of_rows = scales.rows_mut(5, 132).unwrap();
        e4m3(stream, x.view(), &mut codes.rows_mut(rows, k).unwrap(), &mut of_rows.col_range(0..rows).unwrap()).unwrap();
        let of_rows = scales.rows(5, 132).unwrap().col_range(0..rows).unwrap();
        let x = QuantizedInputs::new(codes.rows(rows, k).unwrap(), of_rows).unwrap();
        let got = guard::run::<f32>(stream, rows, n, |y| {
            on.with_weights(|w| grouped_gemm::linear_quantized(stream, x, w, on.owned(), &Epilogue::default(), y).unwrap());
        });
        let quantized = Case { codes: codes.to_vec(stream).unwrap(), scales: of_rows.to_vec(stream).unwrap(), ..case.clone() };
        let [tight, sums] = quantized.want::<f32>();
        within(&got, &tight, n, |i| sum_bound::<f32>(tight[i], k, sums[i]) + lost * sums[i]);
        // The product of the rows as they were.
        let as_they_are = |w: &[f64]| oracle::quantize::product(&exact, w, &owners(&offsets(&sizes)), n, k);
        let w_scales: Vec<f64> = to_f64(&case.w_scales);
        let each = w_scales.len() / 3;
        let of = |e: usize| oracle::quantize::weights(&case.w[e * n * k..][..n * k], &w_scales[e * each..][..each], k, case.block);
        let [want, magnitudes] = as_they_are(&(0..3).flat_map(of).collect::<Vec<_>>());
        within(&got, &want, n, |i| magnitudes[i] / 16.0);
        let off = relative_l2(&to_f64(&got), &want);
        assert!((0.01..0.03).contains(&off), "relative error {off:.4}");
    });
}

/// Weights and scales as a checkpoint of DeepSeek's kind has them, and the product of another implementation.
#[test]
fn goldens() {
    let goldens = Goldens::open("quant/fp8_products.safetensors");
    for (case, experts) in [("c1", 2), ("c3", 1)] {
        let bytes = |name: &str| goldens.f64(name).iter().map(|byte| *byte as u8).collect::<Vec<_>>();
        let [n, k] = goldens.shape(&format!("{case}.0.weight"))[..] else { panic!("two dimensions") };
        let w: Vec<u8> = (0..experts).flat_map(|e| bytes(&format!("{case}.{e}.weight"))).collect();
        let w_scales: Vec<f32> = (0..experts).flat_map(|e| goldens.float::<f32>(&format!("{case}.{e}.weight_scale_inv"))).collect();
        let x = goldens.float::<f32>(&format!("{case}.x"));
        let want = goldens.f64(&format!("{case}.y"));
        let rows = experts * 5;
        let (codes, scales) = oracle::quantize::e4m3(&x.repeat(experts), k);
        let case = Case { sizes: vec![5; experts], n, k, block: [128, 128], codes, scales, w, w_scales };
        let [tight, sums] = case.want::<f32>();
        let magnitudes: Vec<f64> = sums.iter().map(|sum| sum * 1.1).collect();
        each_device(|stream, lost| {
            let got = case.run::<f32, f32>(stream);
            assert_eq!(got.len(), rows * n);
            within(&got, &tight, n, |i| sum_bound::<f32>(tight[i], k, sums[i]) + lost * sums[i]);
            within(&got, &want, n, |i| magnitudes[i] / 16.0);
        });
    }
}

/// The bits of a row depend on it alone: not on others, on their number or on its place.
#[test]
fn rows_do_not_depend_on_others() {
    let (n, k, experts) = (264, 272, 3);
    let all = Case::random(&[131, 0, 0], n, k, [128, 128]);
    let w = Case::random(&[1; 3], n, k, [128, 128]);
    let blocks = k.div_ceil(128);
    let with_rows = |rows: &[usize], sizes: [u32; 3]| Case {
        sizes: sizes.to_vec(),
        codes: rows.iter().flat_map(|row| all.codes[row * k..][..k].to_vec()).collect(),
        scales: (0..blocks).flat_map(|block| rows.iter().map(move |row| (block, *row))).map(|(b, row)| all.scales[b * 131 + row]).collect(),
        ..w.clone()
    };
    assert_eq!(w.experts(), experts);
    device::each_gpu(|stream| {
        let alone = with_rows(&[7], [0, 1, 0]).run::<f32, Bf16>(stream);
        let others: Vec<usize> = (0..131).map(|row| if row == 7 { 8 } else { row }).collect();
        for (sizes, at) in [([0, 131, 0], 0), ([0, 131, 0], 130), ([3, 100, 28], 67), ([129, 1, 1], 129), ([130, 1, 0], 130)] {
            let mut rows = others.clone();
            rows[at] = 7;
            let y = with_rows(&rows, sizes).run::<f32, Bf16>(stream);
            same_bits(&y[at * n..][..n], &alone);
        }
    });
}

/// A NaN in a row or in its scales reaches that row alone. NaN in the weights and the scales of an expert
/// without rows, and beyond the edges, reaches no result.
#[test]
fn a_nan_stays_where_it_is() {
    let (n, k) = (40, 144);
    let clean = Case::random(&[5, 0, 70], n, k, [128, 128]);
    let mut dirty = clean.clone();
    dirty.codes[2 * k + 143] = 0x7f;
    dirty.scales[75 + 9] = f32::NAN;
    dirty.w[n * k..2 * n * k].fill(0xff);
    dirty.w_scales[2..4].fill(f32::NAN);
    each_device(|stream, _| {
        let (clean, dirty) = (clean.run::<f32, Bf16>(stream), dirty.run::<f32, Bf16>(stream));
        for (row, (clean, dirty)) in clean.chunks(n).zip(dirty.chunks(n)).enumerate() {
            if row == 2 || row == 9 {
                assert!(dirty.iter().all(|y| y.to_f32().is_nan()), "row {row}");
            } else {
                same_bits(dirty, clean);
            }
        }
    });
}

/// One NaN among the weights spoils its output, one among their scales a block of outputs.
#[test]
fn a_nan_of_the_weights_spoils_its_outputs() {
    let (n, k) = (264, 144);
    let mut case = Case::random(&[3], n, k, [128, 128]);
    case.w[7 * k + 3] = 0x7f;
    case.w_scales[2 * 2 + 1] = f32::NAN; // the third block of outputs, the second of k
    each_device(|stream, _| {
        for (i, y) in case.run::<f32, f32>(stream).iter().enumerate() {
            assert_eq!(y.is_nan(), i % n == 7 || i % n >= 256, "output {}", i % n);
        }
    });
}

/// One pair of blocks, a few, and more than there are tiles: together they take each tile once, and the count
/// ends at zero.
#[test]
fn any_number_of_pairs_takes_every_tile_once() {
    if device::hardware_only() {
        return; // asks for devices of other sizes
    }
    for (sm_count, schedule) in [(3, Schedule::Reverse), (8, Schedule::Random(1)), (132, Schedule::Random(2))] {
        let options = Options { sm_count, schedule, tma: TmaCompletion::Random, ..Options::default() };
        let driver = Arc::new(Emulated::new(options));
        let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
        for (sizes, k) in [(&[1, 127, 0, 128, 129, 255, 257, 0][..], 16), (&[0, 0, 256], 144)] {
            let case = Case::exact(sizes, 520, k);
            let [want, _] = case.want::<f32>();
            let want: Vec<f32> = want.iter().map(|want| *want as f32).collect();
            same_bits(&case.run::<f32, f32>(&stream), &want);
            let (address, bytes) = stream.scratch().unwrap();
            // SAFETY: the stream's own zeros, which outlive the view.
            let scratch = unsafe { Rows::<u32>::from_raw(stream.place(), address, 1, bytes / 4, bytes / 4).unwrap() };
            assert_eq!(scratch.to_vec(&stream).unwrap()[0], 0, "{sm_count} SMs, {sizes:?}");
        }
        assert_eq!(driver.reports(), [""; 0]);
    }
}

#[test]
fn nothing_is_a_no_op() {
    each_device(|stream, _| {
        assert_eq!(Case::exact(&[0, 0], 16, 32).run::<f32, f32>(stream), [0f32; 0]);
    });
}

fn refused<S: Float + Bits>(case: &Case, stream: &Stream, w: impl FnOnce(&OnDevice<S>, &mut dyn FnMut(ExpertWeights<'_>))) -> String {
    let on = case.on::<S>(stream);
    let mut y = Guarded::<f32>::new(stream, case.rows(), case.n, 0, POISONS[0]);
    let mut text = String::new();
    w(&on, &mut |w| {
        let error = grouped_gemm::linear_quantized(stream, on.x(), w, on.owned(), &Epilogue::default(), &mut y.view_mut());
        text = error.err().unwrap().to_string();
    });
    y.assert_untouched(stream);
    text
}

#[test]
fn what_is_refused_everywhere() {
    let case = Case::exact(&[3, 2], 16, 32);
    device::each_device(|stream| {
        let text = refused::<f32>(&case, stream, |_, f| {
            let floats = Guarded::with(stream, &[0f32; 2 * 16 * 32], 32, 32, 0);
            f(ExpertWeights::nk(floats.view(), 2).unwrap());
        });
        assert_eq!(text, "grouped_gemm: `w` of type f32 is not supported here; supported: e4m3");
        let text = refused::<f32>(&case, stream, |on, f| {
            let narrow =
                QuantizedRows::e4m3(on.w.view().row_range(0..24).unwrap(), on.w_scales.view().row_range(0..1).unwrap(), [128, 128]);
            f(ExpertWeights::nk(narrow.unwrap(), 1).unwrap());
        });
        assert_eq!(text, "grouped_gemm: `w` must be [E, N, K] = [2, 16, 32], got [1, 24, 32]");
        let mut buffers = RoutingBuffers::new(stream, 5, 1, 2).unwrap();
        let routing = Routing::from_host(stream, &[0, 0, 0, 1, 1], &[1.0; 5], &mut buffers).unwrap();
        let (on, mut y) = (case.on::<f32>(stream), Guarded::<f32>::new(stream, 5, 16, 0, POISONS[0]));
        on.with_weights(|w| {
            let rows = routing.gathered_rows();
            let error = grouped_gemm::linear_quantized(stream, on.x(), w, rows, &Epilogue::default(), &mut y.view_mut());
            assert!(error.err().unwrap().to_string().contains("`rows` that are gathered"));
        });
        y.assert_untouched(stream);
    });
}

/// What the one kernel does not serve, with numbers.
#[test]
fn what_is_refused_on_a_gpu() {
    device::each_gpu(|stream| {
        let with = |n: usize, k: usize, block: [usize; 2]| {
            let case = Case::with_block(&[3, 2], n, k, block, |_| 0x38, |_| 1.0);
            refused::<f32>(&case, stream, |on, f| on.with_weights(f))
        };
        assert_eq!(with(16, 24, [128, 128]), "grouped_gemm: FP8 weights with a K of 24 is not supported here; supported: multiples of 16");
        assert_eq!(with(12, 32, [128, 128]), "grouped_gemm: FP8 weights with an N of 12 is not supported here; supported: multiples of 8");
        for (block, shown) in [([64, 128], "64 x 128"), ([128, 64], "128 x 64"), ([1, 128], "1 x 128")] {
            let text = with(256, 256, block);
            assert!(text.starts_with(&format!("grouped_gemm: `w` with a scale for each block of {shown} is not")), "{text}");
        }
        // Halves that begin within a block.
        let case = Case::random(&[3], 400, 32, [128, 128]);
        let on = case.on::<f32>(stream);
        let mut y = Guarded::<f32>::new(stream, 3, 200, 0, POISONS[0]);
        let all = ExpertWeights::nk(QuantizedRows::e4m3(on.w.view(), on.w_scales.view(), [128, 32]).unwrap(), 1).unwrap();
        let second = all.halves().unwrap()[1];
        let error = grouped_gemm::linear_quantized(stream, on.x(), second, on.owned(), &Epilogue::default(), &mut y.view_mut());
        assert!(error.err().unwrap().to_string().contains("of every 1th row from row 72"));
        y.assert_untouched(stream);
    });
}
