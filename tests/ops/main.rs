//! Every operation against its oracle, on every device there is. One module per operation, by its stem.

use dropless_kit::oracle;

mod attention;
mod attention_decode;
mod attention_prefill;
mod block_sparse;
mod block_sparse_tiles;
mod embedding;
mod epilogue;
mod far;
mod glu;
mod grouped_gemm;
mod grouped_gemm_formats;
mod grouped_gemm_fp8;
mod grouped_gemm_quantized;
mod grouped_gemm_tiles;
mod limits;
mod moe;
mod moe_fp8;
mod moe_interleaved;
mod norm;
mod norm_addend;
mod parallel;
mod permute;
mod quantize;
mod quantized_cpu;
mod random;
mod repack;
mod rope;
mod router;
mod sample;

/// The CPU's tests again with the other instruction sets of this machine: the best one is what all tests take by themselves.
#[test]
#[cfg(target_arch = "x86_64")]
fn every_instruction_set() {
    use std::process::Command;

    if dropless_kit::device::hardware_only() {
        return;
    }
    let mut others = vec!["portable"];
    if is_x86_feature_detected!("avx512f") {
        others.push("avx2");
    }
    for name in others {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--skip", "tiles", "--skip", "every_instruction_set"]).env("DROPLESS_SIMD", name).env("DROPLESS_CPU_ONLY", "1");
        let output = again.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !text.contains("running 0 tests"), "DROPLESS_SIMD={name}\n{text}");
    }
}

/// A stream that silently computed with another set would give other figures and other bits than were asked for.
#[test]
fn an_unknown_instruction_set_is_refused() {
    use std::process::Command;

    const NAMES: [(&str, &str); 3] = [("avx1024", "avx1024"), ("\u{1b}[2J", "\\u{1b}[2J"), ("AVX2", "AVX2")];
    if let Some((_, shown)) = NAMES.iter().find(|(name, _)| std::env::var("DROPLESS_SIMD").as_deref() == Ok(name)) {
        for device in [dropless::Device::cpu(), dropless::Device::cpu_with_threads(1).unwrap()] {
            let text = device.stream().err().unwrap().to_string();
            let wanted = format!("device: DROPLESS_SIMD = {shown} is not supported here; supported: ");
            assert!(text.starts_with(&wanted) && text.ends_with("portable"), "{text}");
        }
        return;
    }
    assert!(dropless::Device::cpu().stream().is_ok());
    for (name, _) in NAMES {
        let mut again = Command::new(std::env::current_exe().unwrap());
        let output = again.args(["--exact", "an_unknown_instruction_set_is_refused"]).env("DROPLESS_SIMD", name).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{name:?}\n{text}");
    }
}
