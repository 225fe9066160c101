//! The block against candle's loop over the experts.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor};
use common::{Loop, Weights, noise};
use dropless::router::{Choice, Normalize, Score};
use dropless_candle::{Experts, Moe, Runtime};

/// The largest difference, of the largest number.
fn error(got: &Tensor, want: &Tensor) -> Result<f32> {
    let largest = |x: &Tensor| x.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    Ok(largest(&(got.to_dtype(DType::F32)? - want.to_dtype(DType::F32)?)?)? / largest(want)?)
}

fn tokens(shape: &[usize], dtype: DType) -> Result<Tensor> {
    noise(99, shape, dtype)
}

/// Both forms of the weights, where those lie.
fn blocks(weights: &Weights, top_k: usize) -> Result<[Moe; 2]> {
    let Weights { router, gate, up, down } = weights;
    let (gate, up, down) = (gate.clone(), up.clone(), down.clone());
    let packed = Experts::Packed { gate_up: weights.gate_up()?, down: down.clone() };
    let runtime = Runtime::new(router.device())?;
    let block = |experts| Moe::new(&runtime, router.clone(), experts, top_k);
    Ok([block(packed)?, block(Experts::Separate { gate, up, down })?])
}

/// Against the loop in `f32` on the same, rounded, weights and tokens: the loop in 16 bits rounds the
/// router's logits and chooses others.
#[test]
fn the_block_computes_what_the_loop_does() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 1.5e-2), (DType::F16, 2e-3)] {
        for ([e, d, f], top_k) in [([8, 64, 96], 2), ([5, 40, 24], 1), ([3, 17, 9], 3)] {
            let weights = Weights::random([e, d, f], dtype)?;
            let exact = Loop::new(&weights.to_dtype(DType::F32)?, top_k)?;
            for block in blocks(&weights, top_k)? {
                for num_tokens in [1, 2, 33, 7] {
                    let x = tokens(&[num_tokens, d], dtype)?;
                    let y = block.forward(&x)?;
                    assert_eq!((y.dims(), y.dtype()), (x.dims(), dtype));
                    let error = error(&y, &exact.forward(&x.to_dtype(DType::F32)?)?)?;
                    assert!(error < tolerance, "{dtype:?}, E {e}, D {d}, F {f}, k {top_k}, T {num_tokens}: {error:e}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn weights_of_16_bits_serve_tokens_of_32() -> Result<()> {
    let weights = Weights::random([4, 32, 48], DType::BF16)?;
    let exact = Loop::new(&weights.to_dtype(DType::F32)?, 2)?;
    let x = tokens(&[9, 32], DType::F32)?;
    for block in blocks(&weights, 2)? {
        assert!(error(&block.forward(&x)?, &exact.forward(&x)?)? < 2e-6);
    }
    Ok(())
}

#[test]
fn tokens_may_lie_anyhow() -> Result<()> {
    let weights = Weights::random([4, 32, 48], DType::F32)?;
    let [block, _] = blocks(&weights, 2)?;
    let x = tokens(&[2, 3, 32], DType::F32)?;
    let y = block.forward(&x)?;
    assert_eq!(y.dims(), [2, 3, 32]);
    let flat = block.forward(&x.reshape((6, 32))?)?;
    assert_eq!(y.flatten_to(1)?.to_vec2::<f32>()?, flat.to_vec2::<f32>()?);
    let transposed = x.t()?.contiguous()?.t()?;
    assert_eq!(block.forward(&transposed)?.to_vec3::<f32>()?, y.to_vec3::<f32>()?);
    let second = block.forward(&x.narrow(0, 1, 1)?)?;
    assert_eq!(second.to_vec3::<f32>()?[0], y.to_vec3::<f32>()?[1]);
    assert_eq!(Module::forward(&block, &x.narrow(0, 0, 0)?)?.dims(), [0, 3, 32]);
    Ok(())
}

/// Weights that begin inside a tensor's storage.
#[test]
fn weights_may_be_parts_of_larger_tensors() -> Result<()> {
    let weights = Weights::random([6, 32, 48], DType::F32)?;
    let part = |tensor: &Tensor| tensor.narrow(0, 2, 4);
    let parts = Weights { router: part(&weights.router)?, gate: part(&weights.gate)?, up: part(&weights.up)?, down: part(&weights.down)? };
    let x = tokens(&[5, 32], DType::F32)?;
    let want = Loop::new(&parts, 2)?.forward(&x)?;
    for block in blocks(&parts, 2)? {
        assert!(error(&block.forward(&x)?, &want)? < 2e-6);
    }
    Ok(())
}

#[test]
fn weights_may_stay_as_softmax_gives_them() -> Result<()> {
    let weights = Weights::random([4, 16, 24], DType::F32)?;
    let x = tokens(&[3, 16], DType::F32)?;
    let [scaled, unscaled] = blocks(&weights, 1)?;
    let unscaled = unscaled.with_choice(Choice::default().with_normalize(Normalize::None));
    let logits = x.matmul(&weights.router.t()?)?;
    let best = candle_nn::ops::softmax_last_dim(&logits)?.max_keepdim(1)?;
    assert!(error(&unscaled.forward(&x)?, &scaled.forward(&x)?.broadcast_mul(&best)?)? < 1e-6);
    Ok(())
}

/// A bias that outweighs every score has all tokens go to one expert, whose weight is 1.
#[test]
fn biases_choose() -> Result<()> {
    let weights = Weights::random([4, 16, 24], DType::BF16)?;
    let x = tokens(&[5, 16], DType::F32)?;
    let one = |tensor: &Tensor| tensor.narrow(0, 2, 1)?.to_dtype(DType::F32);
    let Weights { router, gate, up, down } = &weights;
    let second = Loop::new(&Weights { router: one(router)?, gate: one(gate)?, up: one(up)?, down: one(down)? }, 1)?.forward(&x)?;
    let bias = Tensor::new(&[9f32, 9.0, 0.0, 0.0, 99.0, 0.0], &Device::Cpu)?.narrow(0, 2, 4)?; // inside of a larger tensor
    for block in blocks(&weights, 1)? {
        assert!(error(&block.with_logit_bias(bias.clone())?.forward(&x)?, &second)? < 1e-6);
    }
    let other = Tensor::new(&[0f32, 0.0, 0.0, 999.0], &Device::Cpu)?;
    for block in blocks(&weights, 1)? {
        let both = block.with_choice(Choice::default().with_score(Score::Sigmoid)).with_logit_bias(other.clone())?;
        assert!(error(&both.with_choice_bias(bias.clone())?.forward(&x)?, &second)? < 1e-6, "the scores are at most 1");
    }
    let [block, same] = blocks(&weights, 1)?;
    let text = block.with_choice_bias(bias.narrow(0, 0, 3)?).err().unwrap().to_string();
    assert!(text.contains("`choice_bias` must be [4] in f32, got [3] in F32"), "{text}");
    let text = same.with_logit_bias(bias.to_dtype(DType::BF16)?).err().unwrap().to_string();
    assert!(text.contains("`logit_bias` must be [4] in f32, got [4] in BF16"), "{text}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let weights = Weights::random([4, 32, 48], DType::F32)?;
    let Weights { router, gate, up, down } = &weights;
    let separate = |gate: &Tensor| Experts::Separate { gate: gate.clone(), up: up.clone(), down: down.clone() };
    let runtime = Runtime::new(&Device::Cpu)?;
    let text = |experts, top_k| Moe::new(&runtime, router.clone(), experts, top_k).err().unwrap().to_string();
    assert!(text(separate(&gate.narrow(1, 0, 47)?), 2).contains("`gate` must be [4, 48, 32], got [4, 47, 32]"));
    assert!(text(separate(&gate.to_dtype(DType::BF16)?), 2).contains("got BF16 and F32"));
    assert!(text(separate(&gate.transpose(1, 2)?.contiguous()?.transpose(1, 2)?), 2).contains("`gate` must be contiguous"));
    assert!(text(separate(gate), 5).contains("`top_k` must be between 1 and 4, got 5"));
    assert!(text(Experts::Packed { gate_up: gate.clone(), down: down.clone() }, 2).contains("`gate_up` must be [4, 96, 32]"));
    let block = Moe::new(&runtime, router.clone(), separate(gate), 2)?;
    assert!(block.forward(&tokens(&[3, 31], DType::F32)?).err().unwrap().to_string().contains("`x` must be [.., 32], got [3, 31]"));
    assert!(block.forward(&tokens(&[3, 32], DType::F64)?).err().unwrap().to_string().contains("must be f32, bf16 or f16"));
    Ok(())
}

/// candle's slices on candle's stream, against the CPU on the same numbers, and against candle's loop on the
/// GPU.
#[cfg(feature = "cuda")]
#[test]
fn the_block_computes_the_same_on_a_gpu() -> Result<()> {
    let gpu = match Device::new_cuda(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("skipped: {error}");
            return Ok(());
        }
    };
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 2e-2)] {
        let weights = Weights::random([8, 256, 512], dtype)?;
        let there = weights.each(|weight| weight.to_device(&gpu))?;
        let theirs = Loop::new(&there.to_dtype(DType::F32)?, 2)?;
        for (on_gpu, on_cpu) in blocks(&there, 2)?.into_iter().zip(blocks(&weights, 2)?) {
            for num_tokens in [1, 8, 65, 200] {
                let x = tokens(&[num_tokens, 256], dtype)?;
                let moved = x.to_device(&gpu)?;
                // Work of candle's before and behind: nothing but the stream puts it in order.
                let y = on_gpu.forward(&moved.affine(2.0, 0.0)?.affine(0.5, 0.0)?)?.affine(2.0, 0.0)?.affine(0.5, 0.0)?;
                let y = y.to_device(&Device::Cpu)?;
                let looped = theirs.forward(&moved.to_dtype(DType::F32)?)?.to_device(&Device::Cpu)?;
                for (name, error) in [("the CPU", error(&y, &on_cpu.forward(&x)?)?), ("the loop", error(&y, &looped)?)] {
                    assert!(error < tolerance, "{dtype:?}, T {num_tokens}, {name}: {error:e}");
                }
            }
        }
        // A bias moves choices, there as here.
        let bias = Tensor::new(&[0.5f32, 0.0, -0.5, 0.0, 0.25, 0.0, 0.0, 1.0], &Device::Cpu)?;
        let ([on_gpu, _], [on_cpu, _]) = (blocks(&there, 2)?, blocks(&weights, 2)?);
        let x = tokens(&[33, 256], dtype)?;
        let y = on_gpu.with_logit_bias(bias.to_device(&gpu)?)?.forward(&x.to_device(&gpu)?)?.to_device(&Device::Cpu)?;
        let error = error(&y, &on_cpu.with_logit_bias(bias)?.forward(&x)?)?;
        assert!(error < tolerance, "{dtype:?} with a bias: {error:e}");
    }
    Ok(())
}
