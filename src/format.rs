//! Formats of quantised weights: how many elements share a block, and how many bytes a block takes.

/// How the bytes of weights become numbers.
///
/// | format | elements, bytes of a block | an element | known from |
/// |---|---|---|---|
/// | [`E4m3`](Format::E4m3) | 1, 1 | `fp8 * s` | DeepSeek-V3, Qwen3-FP8, compressed-tensors `float-quantized` |
/// | [`Mxfp4`](Format::Mxfp4) | 32, 16 | `e2m1 * 2^(s - 127)` | gpt-oss |
/// | [`Int4`](Format::Int4) | 8, 4 | `(q - z) * s` | compressed-tensors `pack-quantized`; GPTQ and AWQ once repacked |
/// | [`Q8_0`](Format::Q8_0) | 32, 34 | `d * q` | GGUF |
/// | [`Q4_0`](Format::Q4_0), [`Q5_0`](Format::Q5_0) | 32, 18 or 22 | `d * (q - 8)`, `d * (q - 16)` | GGUF |
/// | [`Q4_1`](Format::Q4_1), [`Q5_1`](Format::Q5_1) | 32, 20 or 24 | `d * q + m` | GGUF |
/// | [`Q4K`](Format::Q4K), [`Q5K`](Format::Q5K) | 256, 144 or 176 | `(d * sc) * q - dmin * mn` | GGUF |
/// | [`Q6K`](Format::Q6K) | 256, 210 | `(d * sc) * q` | GGUF |
/// | [`GgufMxfp4`](Format::GgufMxfp4) | 32, 17 | `e2m1 * 2^(e - 127)` | GGUF |
///
/// The first three have their scales in another tensor. The others hold them in the block. Every product and
/// every sum above is rounded to `f32`, in the order of the formula.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// A byte each, 4 bits of exponent and 3 of mantissa, no infinity; scales beside them.
    E4m3,
    /// Four bits each, two of exponent and one of mantissa; a power of two for 32 elements, beside them.
    Mxfp4,
    /// Four bits each, unsigned; a scale and perhaps a zero point for a group, beside them.
    Int4,
    /// GGUF's type 8.
    Q8_0,
    /// GGUF's type 2.
    Q4_0,
    /// GGUF's type 3.
    Q4_1,
    /// GGUF's type 6.
    Q5_0,
    /// GGUF's type 7.
    Q5_1,
    /// GGUF's type 12.
    Q4K,
    /// GGUF's type 13.
    Q5K,
    /// GGUF's type 14.
    Q6K,
    /// GGUF's type 39: elements in another order than [`Mxfp4`](Format::Mxfp4), their power of two before
    /// them.
    GgufMxfp4,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 12] = [
        Format::E4m3,
        Format::Mxfp4,
        Format::Int4,
        Format::Q8_0,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
        Format::GgufMxfp4,
    ];

    /// The name in messages: `e4m3`, `mxfp4`, `int4`, `q8_0`, ...
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// Elements of a block. A row is a whole number of blocks.
    pub const fn block_elements(self) -> usize {
        self.row().1
    }

    /// Bytes of a block, without scales that lie elsewhere.
    pub const fn block_bytes(self) -> usize {
        self.row().2
    }

    /// Whether scales lie in a tensor of their own.
    pub const fn has_scales_apart(self) -> bool {
        matches!(self, Format::E4m3 | Format::Mxfp4 | Format::Int4)
    }

    const fn row(self) -> (&'static str, usize, usize) {
        match self {
            Format::E4m3 => ("e4m3", 1, 1),
            Format::Mxfp4 => ("mxfp4", 32, 16),
            Format::Int4 => ("int4", 8, 4),
            Format::Q8_0 => ("q8_0", 32, 34),
            Format::Q4_0 => ("q4_0", 32, 18),
            Format::Q4_1 => ("q4_1", 32, 20),
            Format::Q5_0 => ("q5_0", 32, 22),
            Format::Q5_1 => ("q5_1", 32, 24),
            Format::Q4K => ("q4_k", 256, 144),
            Format::Q5K => ("q5_k", 256, 176),
            Format::Q6K => ("q6_k", 256, 210),
            Format::GgufMxfp4 => ("gguf mxfp4", 32, 17),
        }
    }
}
