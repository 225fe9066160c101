//! Sums of a row's deviations and of their squares.

/// Elements that are widened at a time.
const BLOCK: usize = 512;
/// Partial sums of a block.
const LANES: usize = 16;

/// The sums of `x[i] - center` and of its square, of `len` elements that `widen` writes as f32 from an
/// element on: in lanes within a block, block after block.
#[inline(always)] // of the two sums, callers want one or both
pub(crate) fn moments(len: usize, center: f32, widen: impl Fn(usize, &mut [f32])) -> (f32, f32) {
    let mut block = [0f32; BLOCK];
    let (mut sum, mut squares) = (0.0, 0.0);
    for at in (0..len).step_by(BLOCK) {
        let n = BLOCK.min(len - at);
        widen(at, &mut block[..n]);
        let padded = n.next_multiple_of(LANES);
        block[n..padded].fill(center); // deviates by nothing
        let (mut lane_sums, mut lane_squares) = ([0f32; LANES], [0f32; LANES]);
        for x in block[..padded].as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                let deviation = x[lane] - center;
                lane_sums[lane] += deviation;
                lane_squares[lane] += deviation * deviation;
            }
        }
        sum += fold(lane_sums);
        squares += fold(lane_squares);
    }
    (sum, squares)
}

/// Halves the lanes until one is left.
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        (0..width).for_each(|lane| lanes[lane] += lanes[lane + width]);
        width /= 2;
    }
    lanes[0]
}
