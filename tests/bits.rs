//! The bits of every kernel's results, as hashes: what a change of design must not change.
//!
//! Inputs are seeded. The CPU's hashes hold for instruction sets with fused multiply-adds on Linux, whose mathematical library some of them
//! show; those of the GPU hold for the emulator, whose approximations of `ex2` and the like need not be those of a chip. A change that is
//! meant to change results changes the table below and says why: `DROPLESS_BITS=print cargo test --test bits` prints the new one.
#![cfg(all(feature = "cuda", target_arch = "x86_64", target_os = "linux"))]

use std::process::Command;

use dropless::activation::{Activation, Glu};
use dropless::block_sparse::{Dense, Sparse};
use dropless::epilogue::Epilogue;
use dropless::layout::{KvLayer, KvLayerMut, KvShape};
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::rope::{Pairing, Projected, QkNorm};
use dropless::router::Normalize;
use dropless::{
    Bf16, Buffer, ExpertRows, ExpertWeights, F16, Float, Format, HeadLayout, KvCache, Place, QuantizedRows, RopeTable, Routing,
    RoutingBuffers, Rows, RowsMut, Stream, Tiles, TokenIds, Topology, Workspace, attention, block_sparse, embedding, glu, grouped_gemm,
    norm, permute, quantize, random, repack, rope, router, sample,
};
use dropless_kit::device;
use dropless_kit::fill::{Random, blocks, bytes, normal};
use dropless_kit::guard::Bits;
use dropless_kit::pages::Step;

/// FNV-1a over the bits of all results of an operation.
struct Hash(u64);

impl Hash {
    fn new() -> Hash {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    fn word(&mut self, word: u32) {
        for byte in word.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn all<T: Bits>(&mut self, values: &[T]) {
        values.iter().for_each(|value| self.word(value.bits()));
    }
}

/// A stream, and the results on it so far.
struct Run<'a> {
    stream: &'a Stream,
    hash: Hash,
}

impl Run<'_> {
    /// A matrix of normal numbers on the device.
    fn fill<T: Float>(&self, seed: u64, len: usize) -> Buffer<T> {
        Buffer::from_slice(self.stream, &normal::<T>(seed, len, 1.0)).unwrap()
    }

    /// Adds the matrix that `work` writes.
    fn output<T: Bits>(&mut self, rows: usize, cols: usize, work: impl FnOnce(&Stream, &mut RowsMut<'_, T>)) {
        let mut y = Buffer::<T>::zeros(self.stream, rows * cols).unwrap();
        work(self.stream, &mut y.rows_mut(rows, cols).unwrap());
        self.hash.all(&y.to_vec(self.stream).unwrap());
    }
}

/// Distinct experts for each token, unevenly.
fn ids(tokens: usize, top_k: usize, experts: usize) -> Vec<u32> {
    let mut random = Random::new(7);
    let choices = |random: &mut Random| {
        let first = random.below(experts).min(random.below(experts));
        (0..top_k).map(move |choice| ((first + choice) % experts) as u32)
    };
    (0..tokens).flat_map(|_| choices(&mut random).collect::<Vec<_>>()).collect()
}

fn embedding_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let table = run.fill::<T>(1, 9 * 72);
    let mut on_device = Buffer::zeros(run.stream, 4).unwrap();
    let tokens = TokenIds::from_host(run.stream, &[8, 0, 3, 8], 9, &mut on_device).unwrap();
    run.output::<T>(4, 72, |stream, y| embedding::lookup(stream, tokens, table.rows(9, 72).unwrap(), y).unwrap());
}

fn norm_bits<T: Float + Bits>(run: &mut Run<'_>) {
    for cols in [24, 1032] {
        let (x, weight) = (run.fill::<T>(1, 5 * cols), run.fill::<T>(2, cols));
        let (x, weight) = (x.rows(5, cols).unwrap(), weight.rows(1, cols).unwrap());
        run.output::<T>(5, cols, |stream, y| norm::layer_norm(stream, x, weight, 1e-5, y).unwrap());
        run.output::<T>(5, cols, |stream, y| norm::rms_norm(stream, x, weight, 1e-6, y).unwrap());
        for form in [0, 1] {
            let mut residual = run.fill::<T>(3, 5 * cols);
            run.output::<T>(5, cols, |stream, y| {
                let sum = &mut residual.rows_mut(5, cols).unwrap();
                match form {
                    0 => norm::add_layer_norm(stream, x, sum, weight, 1e-5, y).unwrap(),
                    _ => norm::add_rms_norm(stream, x, sum, weight, 1e-6, y).unwrap(),
                }
            });
            run.hash.all(&residual.to_vec(run.stream).unwrap());
        }
    }
}

fn glu_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let (gate, up) = (run.fill::<T>(1, 3 * 136), run.fill::<T>(2, 3 * 136));
    run.output::<T>(3, 136, |stream, y| glu::glu(stream, gate.rows(3, 136).unwrap(), up.rows(3, 136).unwrap(), y).unwrap());
}

/// Scaled rows of a table; norms with a bias, and with every option of what is added; gate and up in turn;
/// scaled logits.
fn option_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let table = run.fill::<T>(1, 9 * 72);
    let mut on_device = Buffer::zeros(run.stream, 4).unwrap();
    let tokens = TokenIds::from_host(run.stream, &[8, 0, 3, 8], 9, &mut on_device).unwrap();
    run.output::<T>(4, 72, |stream, y| embedding::lookup_scaled(stream, tokens, table.rows(9, 72).unwrap(), 0.3, y).unwrap());
    for cols in [24, 1032] {
        let [x, also] = [1, 2].map(|seed| run.fill::<T>(seed, 5 * cols));
        let rows = [3, 4, 5, 6].map(|seed| run.fill::<T>(seed, cols));
        let [weight, bias, post_weight, post_bias] = rows.each_ref().map(|row| row.rows(1, cols).unwrap());
        let (x, also) = (x.rows(5, cols).unwrap(), also.rows(5, cols).unwrap());
        let (weights, post) = (norm::Weights::from(weight).with_bias(bias), norm::Weights::from(post_weight).with_bias(post_bias));
        run.output::<T>(5, cols, |stream, y| norm::layer_norm(stream, x, weights, 1e-5, y).unwrap());
        let addends = [
            norm::Addend::from(x).with_also(also),
            norm::Addend::from(x).with_scale(0.22),
            norm::Addend::from(x).with_post_norm(post),
            norm::Addend::from(x).with_also(also).with_scale(-1.5).with_post_norm(post_weight),
        ];
        for (index, addend) in addends.into_iter().enumerate() {
            let mut residual = run.fill::<T>(7, 5 * cols);
            run.output::<T>(5, cols, |stream, y| {
                let sum = &mut residual.rows_mut(5, cols).unwrap();
                match index % 2 {
                    0 => norm::add_layer_norm(stream, addend, sum, weights, 1e-5, y).unwrap(),
                    _ => norm::add_rms_norm(stream, addend, sum, weight, 1e-6, y).unwrap(),
                }
            });
            run.hash.all(&residual.to_vec(run.stream).unwrap());
        }
    }
    let gate_up = run.fill::<T>(8, 3 * 272);
    run.output::<T>(3, 136, |stream, y| {
        glu::gated_interleaved(stream, Glu::GPT_OSS, gate_up.rows(3, 272).unwrap(), y).unwrap();
    });
    for rows in [9, 70] {
        let (x, w) = (run.fill::<T>(9, rows * 72), run.fill::<T>(10, 40 * 72));
        let w = ExpertWeights::nk(w.rows(40, 72).unwrap(), 1).unwrap();
        let (dense, epilogue) = (ExpertRows::dense(rows).unwrap(), Epilogue::default().with_activation(Activation::Scaled(0.125)));
        run.output::<f32>(rows, 40, |stream, y| {
            grouped_gemm::linear(stream, x.rows(rows, 72).unwrap(), w, dense, &epilogue, y).unwrap();
        });
    }
}

fn logits_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let (x, weight) = (run.fill::<T>(1, 6 * 72), run.fill::<T>(2, 17 * 72));
    run.output::<f32>(6, 17, |stream, y| router::logits(stream, x.rows(6, 72).unwrap(), weight.rows(17, 72).unwrap(), y).unwrap());
}

fn route_bits(run: &mut Run<'_>) {
    for (tokens, top_k, experts) in [(5, 4, 16), (140, 2, 8), (3, 7, 256)] {
        let logits = run.fill::<f32>(3, tokens * experts);
        for normalize in [Normalize::None, Normalize::P(1.0), Normalize::P(2.0), Normalize::P(3.5)] {
            let mut buffers = RoutingBuffers::new(run.stream, tokens, top_k, experts).unwrap();
            let routing = router::route(run.stream, logits.rows(tokens, experts).unwrap(), normalize, &mut buffers).unwrap();
            let maps = [routing.expert_ids(), routing.offsets(), routing.row_to_slot(), routing.slot_to_row()];
            maps.iter().for_each(|map| map.to_vec(run.stream).unwrap().into_iter().for_each(|word| run.hash.word(word)));
            run.hash.all(&routing.weights().to_vec(run.stream).unwrap());
        }
    }
}

fn permute_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let (tokens, top_k, experts, cols) = (6, 3, 5, 72);
    let ids = ids(tokens, top_k, experts);
    let mut buffers = RoutingBuffers::new(run.stream, tokens, top_k, experts).unwrap();
    let weights = normal::<f32>(4, ids.len(), 1.0);
    let routing = Routing::from_host(run.stream, &ids, &weights, &mut buffers).unwrap();
    let (x, rows) = (run.fill::<T>(1, tokens * cols), run.fill::<T>(2, ids.len() * cols));
    run.output::<T>(ids.len(), cols, |stream, y| permute::gather(stream, x.rows(tokens, cols).unwrap(), &routing, y).unwrap());
    run.output::<T>(tokens, cols, |stream, y| permute::combine(stream, rows.rows(ids.len(), cols).unwrap(), &routing, y).unwrap());
}

fn code_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let (rows, cols) = (7, 208);
    let x = run.fill::<T>(1, rows * cols);
    let mut scales = Buffer::<f32>::zeros(run.stream, 2 * rows).unwrap();
    run.output::<u8>(rows, cols, |stream, codes| {
        quantize::e4m3(stream, x.rows(rows, cols).unwrap(), codes, &mut scales.rows_mut(2, rows).unwrap()).unwrap();
    });
    run.hash.all(&scales.to_vec(run.stream).unwrap());
}

/// Products of few and of many rows, where the tensor cores serve and where they do not.
fn products<T: Float + Bits>(run: &mut Run<'_>, to_f32: bool) {
    let (top_k, experts) = (2, 3);
    for (tokens, n, k) in [(3, 72, 136), (20, 24, 72), (40, 136, 264), (70, 72, 264), (5, 33, 35), (70, 33, 35)] {
        let ids = ids(tokens, top_k, experts);
        let mut buffers = RoutingBuffers::new(run.stream, tokens, top_k, experts).unwrap();
        let routing = Routing::from_host(run.stream, &ids, &vec![0.5; ids.len()], &mut buffers).unwrap();
        let (x, rows) = (run.fill::<T>(1, tokens * k), run.fill::<T>(2, ids.len() * k));
        let [w, v] = [3, 4].map(|seed| run.fill::<T>(seed, experts * n * k));
        let (x, rows) = (x.rows(tokens, k).unwrap(), rows.rows(ids.len(), k).unwrap());
        let [nk, v] = [&w, &v].map(|w| ExpertWeights::nk(w.rows(experts * n, k).unwrap(), experts).unwrap());
        let kn = ExpertWeights::kn(w.rows(experts * k, n).unwrap(), experts).unwrap();
        let (sorted, gathered) = (routing.expert_rows(), routing.gathered_rows());
        if to_f32 {
            run.output::<f32>(ids.len(), n, |stream, y| grouped_gemm::nt(stream, x, nk, gathered, y).unwrap());
            run.output::<f32>(ids.len(), n, |stream, y| grouped_gemm::nn(stream, rows, kn, sorted, y).unwrap());
        } else {
            run.output::<T>(ids.len(), n, |stream, y| grouped_gemm::nt(stream, rows, nk, sorted, y).unwrap());
            run.output::<T>(ids.len(), n, |stream, y| grouped_gemm::nn(stream, x, kn, gathered, y).unwrap());
            run.output::<T>(ids.len(), n, |stream, y| grouped_gemm::glu_nt(stream, x, nk, v, gathered, y).unwrap());
            run.output::<T>(ids.len(), n, |stream, y| grouped_gemm::glu_nt(stream, rows, nk, v, sorted, y).unwrap());
        }
    }
    let (x, w) = (run.fill::<T>(1, 9 * 72), run.fill::<T>(2, 40 * 72));
    let w = ExpertWeights::nk(w.rows(40, 72).unwrap(), 1).unwrap();
    let dense = ExpertRows::dense(9).unwrap();
    run.output::<T>(9, 40, |stream, y| grouped_gemm::nt(stream, x.rows(9, 72).unwrap(), w, dense, y).unwrap());
}

/// Weights of another type than the input, which the CPU alone multiplies.
fn mixed_products(run: &mut Run<'_>) {
    for (rows, n, k) in [(3, 72, 136), (70, 33, 300)] {
        let (x, w, v) = (run.fill::<f32>(1, rows * k), run.fill::<Bf16>(2, n * k), run.fill::<F16>(3, n * k));
        let (x, owned) = (x.rows(rows, k).unwrap(), ExpertRows::dense(rows).unwrap());
        let w = ExpertWeights::nk(w.rows(n, k).unwrap(), 1).unwrap();
        let v = ExpertWeights::kn(v.rows(k, n).unwrap(), 1).unwrap();
        run.output::<f32>(rows, n, |stream, y| grouped_gemm::nt(stream, x, w, owned, y).unwrap());
        run.output::<Bf16>(rows, n, |stream, y| grouped_gemm::nn(stream, x, v, owned, y).unwrap());
    }
}

/// Random weights of a format, `[n, k]`, on the stream's device; those whose scales lie apart with scales of three
/// types, INT4 with zero points.
fn with_weights(stream: &Stream, format: Format, n: usize, k: usize, work: impl FnOnce(QuantizedRows<'_>)) {
    fn place<T: Float>(stream: &Stream, len: usize) -> Buffer<T> {
        Buffer::from_slice(stream, &normal::<T>(6, len, 0.1)).unwrap()
    }
    let mut random = Random::new(5);
    let place_bytes = |bytes: Vec<u8>| Buffer::from_slice(stream, &bytes).unwrap();
    let codes = place_bytes(blocks(&mut random, format, n * k / format.block_elements()));
    let codes = codes.rows(n, k / format.block_elements() * format.block_bytes()).unwrap();
    let groups = k.div_ceil(64);
    match format {
        Format::E4m3 => {
            let scales = place::<f32>(stream, n / 8 * k.div_ceil(128));
            work(QuantizedRows::e4m3(codes, scales.rows(n / 8, k.div_ceil(128)).unwrap(), [8, 128]).unwrap());
        }
        Format::Int4 => {
            let (scales, zeros) = (place::<Bf16>(stream, n * groups), place_bytes(bytes(&mut random, n / 8 * groups * 4)));
            let rows = QuantizedRows::int4(codes, scales.rows(n, groups).unwrap(), k, 64).unwrap();
            work(rows.with_zeros(zeros.rows(n / 8, 4 * groups).unwrap()).unwrap());
        }
        Format::Mxfp4 => {
            let exponents = place_bytes(bytes(&mut random, n * k / 32).into_iter().map(|byte| 115 + byte % 10).collect());
            work(QuantizedRows::mxfp4(codes, exponents.rows(n, k / 32).unwrap()).unwrap());
        }
        format => work(QuantizedRows::gguf(format, codes, k).unwrap()),
    }
}

/// Products and tables with weights of every format where they lie, inputs taken as they are.
fn quantized_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let (n, k, stream) = (24, 256, run.stream);
    for format in Format::ALL {
        with_weights(stream, format, n, k, |weights| {
            let mut ids = Buffer::zeros(stream, 3).unwrap();
            let ids = TokenIds::from_host(stream, &[23, 0, 7], n, &mut ids).unwrap();
            run.output::<T>(3, k, |stream, y| embedding::lookup_scaled(stream, ids, weights, 0.3, y).unwrap());
            let w = ExpertWeights::nk(weights.with_exact_inputs(), 1).unwrap();
            for rows in [3, 40] {
                let (x, dense) = (run.fill::<T>(1, rows * k), ExpertRows::dense(rows).unwrap());
                let x = x.rows(rows, k).unwrap();
                run.output::<f32>(rows, n, |stream, y| grouped_gemm::nt(stream, x, w, dense, y).unwrap());
                run.output::<T>(rows, n, |stream, y| grouped_gemm::glu_nt(stream, x, w, w, dense, y).unwrap());
            }
        });
    }
}

/// Products of few rows whose inputs are rounded to 8 bits, with a rest of a chunk where the format has one.
fn rounded_bits(run: &mut Run<'_>) {
    let (n, rows, stream) = (24, 7, run.stream);
    for format in Format::ALL {
        let k = if format.block_elements() == 256 { 768 } else { 608 };
        with_weights(stream, format, n, k, |weights| {
            let (x, w) = (run.fill::<f32>(1, rows * k), ExpertWeights::nk(weights, 1).unwrap());
            let (x, dense) = (x.rows(rows, k).unwrap(), ExpertRows::dense(rows).unwrap());
            run.output::<f32>(rows, n, |stream, y| grouped_gemm::nt(stream, x, w, dense, y).unwrap());
        });
    }
}

/// Weights of 4 bits in tiles, and their products where there are such.
fn tile_bits(run: &mut Run<'_>) {
    let (n, k, stream) = (48, 160, run.stream);
    for format in [Format::Int4, Format::Mxfp4] {
        with_weights(stream, format, 2 * n, k, |weights| {
            let w = ExpertWeights::nk(weights, 2).unwrap();
            let tiles = Tiles::of(&w).unwrap();
            let buffer = |[rows, bytes]: [usize; 2]| Buffer::<u8>::zeros(stream, rows * bytes).unwrap();
            let (mut codes, mut scales, mut zeros) = (buffer(tiles.codes()), buffer(tiles.scales()), tiles.zeros().map(buffer));
            let ([panels, bytes], scale_bytes, zero_bytes) = (tiles.codes(), tiles.scales()[1], tiles.zeros().map_or(0, |zeros| zeros[1]));
            let mut zeros_to = zeros.as_mut().map(|zeros| zeros.rows_mut(panels, zero_bytes).unwrap());
            let mut to = [(&mut codes, bytes), (&mut scales, scale_bytes)].map(|(to, bytes)| to.rows_mut(panels, bytes).unwrap());
            let [codes_to, scales_to] = &mut to;
            repack::repack(stream, w, codes_to, scales_to, zeros_to.as_mut()).unwrap();
            let parts = [Some(&codes), Some(&scales), zeros.as_ref()];
            parts.into_iter().flatten().for_each(|part| run.hash.all(&part.to_vec(stream).unwrap()));
            if stream.place() == Place::Host {
                return; // which multiplies no tiles
            }
            let zeros = zeros.as_ref().map(|zeros| zeros.rows(panels, zero_bytes).unwrap());
            let [codes, scales] = [(&codes, bytes), (&scales, scale_bytes)].map(|(part, bytes)| part.rows(panels, bytes).unwrap());
            let w = ExpertWeights::nk(QuantizedRows::tiles(tiles, codes, scales, zeros).unwrap(), 2).unwrap();
            for tokens in [5, 30, 60, 70] {
                let mut buffers = RoutingBuffers::new(stream, tokens, 1, 2).unwrap();
                let routing = Routing::from_host(stream, &ids(tokens, 1, 2), &vec![0.5; tokens], &mut buffers).unwrap();
                let x = run.fill::<Bf16>(1, tokens * k);
                let x = x.rows(tokens, k).unwrap();
                run.output::<f32>(tokens, n, |stream, y| grouped_gemm::nt(stream, x, w, routing.expert_rows(), y).unwrap());
                run.output::<Bf16>(tokens, n, |stream, y| grouped_gemm::glu_nt(stream, x, w, w, routing.gathered_rows(), y).unwrap());
            }
        });
    }
}

fn sparse_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let blocks = [[0, 0], [0, 1], [1, 1]];
    for (block, cols) in [(64, 72), (128, 40), (64, 33)] {
        let topology = Topology::from_blocks(run.stream, block, [block + 8, 2 * block], &blocks).unwrap();
        let [m, n] = topology.dims();
        let (a, b, dense) = (run.fill::<T>(1, m * cols), run.fill::<T>(2, cols * n), run.fill::<T>(3, n * cols));
        let stored = run.fill::<T>(4, blocks.len() * block * block);
        let [a, b, dense] =
            [(&a, m, cols), (&b, cols, n), (&dense, n, cols)].map(|(x, rows, cols)| Dense::from(x.rows(rows, cols).unwrap()));
        let sparse = Sparse::new(&topology, stored.rows(blocks.len() * block, block).unwrap());
        run.output::<T>(blocks.len() * block, block, |stream, y| block_sparse::sdd(stream, a, b, &topology, y).unwrap());
        run.output::<T>(m, cols, |stream, y| block_sparse::dsd(stream, sparse, dense, y).unwrap());
        run.output::<T>(cols, n, |stream, y| block_sparse::dds(stream, a.t(), sparse, y).unwrap());
    }
}

fn attention_bits<T: Float + Bits>(run: &mut Run<'_>) {
    for ((heads, kv_heads, head_dim), sequences) in [((6, 1, 24), [(0, 5), (300, 1)]), ((4, 2, 64), [(33, 1), (40, 3)])] {
        let heads = HeadLayout::new(heads, kv_heads, head_dim).unwrap();
        let step = Step::new(run.stream, &sequences, 16, 5);
        let (tokens, rows) = (step.tokens().len(), step.pool_rows());
        let [mut keys, mut values] = [1, 2].map(|seed| run.fill::<T>(seed, rows * heads.kv_cols()));
        let qkv = run.fill::<T>(3, tokens * heads.qkv_cols());
        let table = RopeTable::new(run.stream, 1e4, head_dim, 512).unwrap();
        let clip = rope::Options::default().with_clip(Some(1.5));
        let options = attention::Options::new(heads).with_scale(0.2);
        let mut q = Buffer::<T>::zeros(run.stream, tokens * heads.q_cols()).unwrap();
        {
            let [keys, values] = [&mut keys, &mut values].map(|pool| pool.rows_mut(rows, heads.kv_cols()).unwrap());
            let mut layer = KvLayerMut::new(step.pages(), heads, keys, values).unwrap();
            let (qkv, mut q) = (qkv.rows(tokens, heads.qkv_cols()).unwrap(), q.rows_mut(tokens, heads.q_cols()).unwrap());
            rope::clip_rotate_append(run.stream, qkv, heads, clip, &table, &mut layer, &mut q).unwrap();
        }
        [&q, &keys, &values].iter().for_each(|written| run.hash.all(&written.to_vec(run.stream).unwrap()));
        let [keys, values] = [&keys, &values].map(|pool| pool.rows(rows, heads.kv_cols()).unwrap());
        let layer = KvLayer::new(step.pages(), heads, keys, values).unwrap();
        let q = q.rows(tokens, heads.q_cols()).unwrap();
        let bytes = attention::decode_workspace_bytes(heads, tokens, step.pages().max_len()).unwrap();
        let mut workspace = Workspace::new(run.stream, bytes).unwrap();
        run.output::<T>(tokens, heads.q_cols(), |stream, y| attention::prefill(stream, q, options, &layer, y).unwrap());
        run.output::<T>(tokens, heads.q_cols(), |stream, y| {
            attention::decode(stream, q, options, &layer, &mut workspace, y).unwrap();
        });
    }
}

/// Norms of queries and keys, the forms of projections, and values of another width than keys.
fn projected_bits<T: Float + Bits>(run: &mut Run<'_>) {
    for (h, d, dv, rotary_dim) in [(4, 32, 32, 16), (3, 10, 7, 4)] {
        let heads = HeadLayout::new(h, h, d).unwrap().with_value_dim(dv).unwrap();
        let (q, qkv) = (run.fill::<T>(3, 3 * heads.q_cols()), run.fill::<T>(4, 3 * heads.qkv_cols()));
        let (kv, k_rope) = (run.fill::<T>(5, 3 * h * (d - rotary_dim + dv)), run.fill::<T>(6, 3 * rotary_dim));
        let (of_head, of_all) = (run.fill::<T>(7, d), run.fill::<T>(8, h * d));
        let [qkv, q] = [(&qkv, heads.qkv_cols()), (&q, heads.q_cols())].map(|(rows, cols)| rows.rows(3, cols).unwrap());
        let (kv, k_rope) = (kv.rows(3, h * (d - rotary_dim + dv)).unwrap(), k_rope.rows(3, rotary_dim).unwrap());
        let (of_head, of_all) = (of_head.rows(1, d).unwrap(), of_all.rows(1, h * d).unwrap());
        let plain = rope::Options::default();
        let calls = [
            (Projected::PerHead(qkv), plain.with_qk_norm(QkNorm::per_head(of_head, of_head, 1e-6))),
            (qkv.into(), plain.with_qk_norm(QkNorm::full_width(of_all, of_all, 1e-5))),
            (Projected::Latent { q, kv, k_rope }, plain.with_pairing(Pairing::Interleaved)),
        ];
        for (qkv, options) in calls {
            let table = RopeTable::new(run.stream, 1e4, rotary_dim, 64).unwrap();
            let mut cache = KvCache::<T>::new(run.stream, 1, KvShape::contiguous(heads, 2, 64)).unwrap();
            cache.append(run.stream, &[1, 2]).unwrap();
            let mut rotated = Buffer::<T>::zeros(run.stream, 3 * heads.q_cols()).unwrap();
            let q = &mut rotated.rows_mut(3, heads.q_cols()).unwrap();
            rope::clip_rotate_append(run.stream, qkv, heads, options, &table, &mut cache.layer_mut(0).unwrap(), q).unwrap();
            let layer = cache.layer(0).unwrap();
            [layer.keys(), layer.values()].iter().for_each(|pool| run.hash.all(&pool.to_vec(run.stream).unwrap()));
            run.hash.all(&rotated.to_vec(run.stream).unwrap());
            let q = rotated.rows(3, heads.q_cols()).unwrap();
            let options = attention::Options::new(heads);
            run.output::<T>(3, heads.context_cols(), |stream, y| attention::prefill(stream, q, options, &layer, y).unwrap());
        }
    }
}

fn sample_bits(run: &mut Run<'_>) {
    let logits = run.fill::<f32>(1, 4 * 1000);
    let mut out = Buffer::zeros(run.stream, 4).unwrap();
    let chosen = sample::argmax(run.stream, logits.rows(4, 1000).unwrap(), &mut out).unwrap();
    chosen.ids().to_vec(run.stream).unwrap().into_iter().for_each(|id| run.hash.word(id));
}

/// The same on every device.
fn draw_bits(run: &mut Run<'_>) {
    let logits = run.fill::<f32>(1, 4 * 1000);
    let numbers = Buffer::from_slice(run.stream, &[3u32, 0, u32::MAX, 7]).unwrap();
    let draws = sample::Draws::new(numbers.rows(1, 4).unwrap(), numbers.rows(1, 4).unwrap()).unwrap();
    for options in [sample::Options::new(0.7), sample::Options::new(1.0).with_top_p(0.6).with_seed(9)] {
        let mut out = Buffer::zeros(run.stream, 4).unwrap();
        let drawn = sample::top_p(run.stream, logits.rows(4, 1000).unwrap(), options, draws, &mut out).unwrap();
        drawn.ids().to_vec(run.stream).unwrap().into_iter().for_each(|id| run.hash.word(id));
    }
}

fn mixer_bits(run: &mut Run<'_>) {
    let (logits, mixer) = (run.fill::<f32>(3, 5 * 16), router::Score::SparseMixer { jitter: 0.2 });
    let choice = router::Choice::from(Normalize::None).with_score(mixer);
    let mut buffers = RoutingBuffers::new(run.stream, 5, 4, 16).unwrap();
    let routing = router::route(run.stream, logits.rows(5, 16).unwrap(), choice, &mut buffers).unwrap();
    routing.expert_ids().to_vec(run.stream).unwrap().into_iter().for_each(|word| run.hash.word(word));
    run.hash.all(&routing.weights().to_vec(run.stream).unwrap());
}

fn random_bits<T: Float + Bits>(run: &mut Run<'_>) {
    for (first, rows, cols) in [(0, 3, 1000), (5, 7, 33)] {
        run.output::<T>(rows, cols, |stream, y| random::uniform(stream, 7, 0.3, first, y).unwrap());
    }
}

fn moe_bits<T: Float + Bits>(run: &mut Run<'_>) {
    let shape = Shape::new(72, 136, 4, 2);
    let Shape { d_model, d_ffn, num_experts, .. } = shape;
    let router = run.fill::<T>(1, num_experts * d_model);
    let matrices = [2, 3, 4].map(|seed| Buffer::from_slice(run.stream, &normal::<T>(seed, num_experts * d_ffn * d_model, 0.1)).unwrap());
    let [w1, v1, w2] = matrices.each_ref().map(|w| w.rows(num_experts * d_ffn, d_model).unwrap());
    let weights = Weights::new(
        router.rows(num_experts, d_model).unwrap(),
        Experts::gated(
            ExpertWeights::nk(w1, num_experts).unwrap(),
            ExpertWeights::nk(v1, num_experts).unwrap(),
            ExpertWeights::kn(w2, num_experts).unwrap(),
        ),
    );
    for tokens in [1, 20, 70] {
        let plan = Plan::<T>::new(shape, tokens).unwrap();
        let mut workspace = Workspace::new(run.stream, plan.workspace_bytes()).unwrap();
        let mut buffers = RoutingBuffers::new(run.stream, tokens, shape.top_k, num_experts).unwrap();
        let x = run.fill::<T>(5, tokens * d_model);
        let x: Rows<'_, T> = x.rows(tokens, d_model).unwrap();
        run.output::<T>(tokens, d_model, |stream, y| {
            moe::forward(stream, &plan, x, &weights, &mut buffers, &mut workspace, y).unwrap();
        });
    }
}

/// Every operation with every type, by name.
fn hashes(stream: &Stream) -> Vec<(&'static str, u64)> {
    type Work = fn(&mut Run<'_>);
    let all: &[(&'static str, &[Work])] = &[
        ("embedding", &[embedding_bits::<f32>, embedding_bits::<Bf16>, embedding_bits::<F16>]),
        ("norm", &[norm_bits::<f32>, norm_bits::<Bf16>, norm_bits::<F16>]),
        ("glu", &[glu_bits::<f32>, glu_bits::<Bf16>, glu_bits::<F16>]),
        ("router", &[logits_bits::<f32>, logits_bits::<Bf16>, logits_bits::<F16>, route_bits]),
        ("permute", &[permute_bits::<f32>, permute_bits::<Bf16>, permute_bits::<F16>]),
        ("quantize", &[code_bits::<f32>, code_bits::<Bf16>, code_bits::<F16>]),
        ("grouped_gemm f32", &[|run| products::<f32>(run, false)]),
        ("grouped_gemm bf16", &[|run| products::<Bf16>(run, false)]),
        ("grouped_gemm f16", &[|run| products::<F16>(run, false)]),
        ("grouped_gemm to f32", &[|run| products::<Bf16>(run, true), |run| products::<F16>(run, true)]),
        ("block_sparse", &[sparse_bits::<f32>, sparse_bits::<Bf16>, sparse_bits::<F16>]),
        ("rope, attention", &[attention_bits::<f32>, attention_bits::<Bf16>, attention_bits::<F16>]),
        ("rope of all forms", &[projected_bits::<f32>, projected_bits::<Bf16>, projected_bits::<F16>]),
        ("sample", &[sample_bits]),
        ("sample top_p", &[draw_bits]),
        ("router sparse mixer", &[mixer_bits]),
        ("random", &[random_bits::<f32>, random_bits::<Bf16>, random_bits::<F16>]),
        ("moe", &[moe_bits::<f32>, moe_bits::<Bf16>, moe_bits::<F16>]),
        ("options", &[option_bits::<f32>, option_bits::<Bf16>, option_bits::<F16>]),
        ("quantised weights", &[quantized_bits::<f32>, quantized_bits::<Bf16>, quantized_bits::<F16>]),
        ("tiles", &[tile_bits]),
    ];
    let hash = |work: &[Work]| {
        let mut run = Run { stream, hash: Hash::new() };
        work.iter().for_each(|work| work(&mut run));
        run.hash.0
    };
    all.iter().map(|(name, work)| (*name, hash(work))).collect()
}

fn compare(got: &[(&str, u64)], want: &[(&str, u64)]) {
    if std::env::var("DROPLESS_BITS").is_ok_and(|value| value == "print") {
        got.iter().for_each(|(name, hash)| println!("    ({name:?}, {hash:#018x}),"));
    }
    assert_eq!(got, want, "results have other bits than before");
}

#[test]
fn the_cpu_gives_the_bits_it_gave() {
    if device::hardware_only() || std::env::var("DROPLESS_SIMD").is_ok_and(|set| set == "portable") {
        return;
    }
    for threads in [1, 3] {
        let stream = device::cpu(threads);
        compare(&hashes(&stream), &CPU);
        let hash = |work: fn(&mut Run<'_>)| {
            let mut run = Run { stream: &stream, hash: Hash::new() };
            work(&mut run);
            run.hash.0
        };
        compare(&[("mixed", hash(mixed_products)), ("rounded inputs", hash(rounded_bits))], &CPU_ALONE);
    }
}

/// The instruction sets of this machine that have fused multiply-adds, each in a process of its own.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    if device::hardware_only() || std::env::var_os("DROPLESS_SIMD").is_some() {
        return;
    }
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
    let sets = [
        ("avx2", avx2),
        ("avx2vnni", avx2 && is_x86_feature_detected!("avxvnni")),
        ("avx512", avx512),
        ("avx512vnni", avx512 && is_x86_feature_detected!("avx512vnni")),
    ];
    for (name, _) in sets.into_iter().filter(|(_, is_there)| *is_there) {
        let mut again = Command::new(std::env::current_exe().unwrap());
        let output = again.args(["--exact", "the_cpu_gives_the_bits_it_gave"]).env("DROPLESS_SIMD", name).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "DROPLESS_SIMD={name}\n{text}");
    }
}

#[test]
fn the_emulated_gpu_gives_the_bits_it_gave() {
    if device::hardware_only() {
        return;
    }
    let (driver, stream) = device::emulated();
    compare(&hashes(&stream), &EMULATED);
    assert_eq!(driver.reports(), [""; 0]);
}

const CPU: [(&str, u64); 21] = [
    ("embedding", 0x6b1b_189e_0129_a09c),
    ("norm", 0x3b45_ab8a_cc25_11be),
    ("glu", 0x5818_0ee3_1738_acd6),
    ("router", 0xe27f_5522_7fb3_bda7),
    ("permute", 0x7da3_f887_ea70_8ae0),
    ("quantize", 0x6884_348c_e10c_7550),
    ("grouped_gemm f32", 0xc319_6a2b_f9c6_5195),
    ("grouped_gemm bf16", 0xfaaf_6379_80cc_dc4b),
    ("grouped_gemm f16", 0xb633_5a77_93bf_de3c),
    ("grouped_gemm to f32", 0x6ca2_d62d_6654_3296),
    ("block_sparse", 0x6e55_633a_6d36_cdb0),
    ("rope, attention", 0xad1e_dc65_b645_266f),
    ("rope of all forms", 0xb54c_aa05_2236_98fb),
    ("sample", 0xb2ff_cc90_efcf_8398),
    ("sample top_p", 0xf543_98f0_99d2_5b34),
    ("router sparse mixer", 0xe7d7_2537_17a1_9944),
    ("random", 0xc359_b4b6_1ca2_72d1),
    ("moe", 0x05c0_b0a0_3b4e_f615),
    ("options", 0x9139_50e5_2340_3952),
    ("quantised weights", 0xb6a4_e0f8_9449_7558),
    ("tiles", 0xa66f_2b0c_55bb_226f),
];

/// What no GPU computes.
const CPU_ALONE: [(&str, u64); 2] = [("mixed", 0xa75f_23d9_de2e_ffbe), ("rounded inputs", 0x0bcc_0726_6528_f2b3)];

const EMULATED: [(&str, u64); 21] = [
    ("embedding", 0x6b1b_189e_0129_a09c),
    ("norm", 0xe623_4eaa_fc07_263d),
    ("glu", 0xe1b6_bd38_1430_ae92),
    ("router", 0x35a8_e629_9757_b472),
    ("permute", 0x7da3_f887_ea70_8ae0),
    ("quantize", 0x6884_348c_e10c_7550),
    ("grouped_gemm f32", 0xad72_ea1b_4ac1_cf7c),
    ("grouped_gemm bf16", 0x4c4d_b5a6_5574_6527),
    ("grouped_gemm f16", 0xe9ab_973a_cfbb_a532),
    ("grouped_gemm to f32", 0x72da_fbb4_c680_0f6c),
    ("block_sparse", 0x6e55_633a_6d36_cdb0),
    // bf16 and f16 attend on the tensor cores, where weights are rounded to the type.
    ("rope, attention", 0x3dea_97b7_9c9a_8c4d),
    ("rope of all forms", 0x8d03_2939_45c7_d2aa),
    ("sample", 0xb2ff_cc90_efcf_8398),
    ("sample top_p", 0xf543_98f0_99d2_5b34),
    ("router sparse mixer", 0xe7d7_2537_17a1_9944),
    ("random", 0xc359_b4b6_1ca2_72d1),
    ("moe", 0x0a32_95f2_a024_e192),
    ("options", 0xc534_046c_b1b5_fa67),
    ("quantised weights", 0x3a27_f58e_708f_dd49),
    ("tiles", 0x6421_b66c_f37c_df8d),
];
