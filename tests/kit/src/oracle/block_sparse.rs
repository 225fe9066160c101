//! Oracle of `block_sparse`, on dense matrices: a sparse one is zero where it has no block.

/// `y[i, j] = sum_k a[i, k] * b[k, j]`.
pub fn product(a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let y = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
    (0..m * n).map(|at| y(at / n, at % n)).collect()
}

/// `y[j, i] = x[i, j]`.
pub fn transposed(x: &[f64], [rows, cols]: [usize; 2]) -> Vec<f64> {
    (0..rows * cols).map(|at| x[at % rows * cols + at / rows]).collect()
}

/// The rows sorted by expert, cut into blocks of at most `block`, none of which crosses from one expert to
/// the next: where each begins, and the last one ends. Columns likewise.
pub fn cut(sizes: &[usize], block: usize) -> Vec<usize> {
    let (mut starts, mut end) = (vec![0], 0);
    for size in sizes {
        (0..*size).step_by(block).for_each(|start| starts.push(end + size.min(&(start + block))));
        end += size;
    }
    starts
}

/// The row and column of every stored element; none for those beyond what their block stands for.
pub fn places(block: usize, row_starts: &[usize], col_starts: &[usize], blocks: &[[u32; 2]]) -> Vec<Option<[usize; 2]>> {
    let place = |at: usize| {
        let [i, j] = blocks[at / (block * block)].map(|id| id as usize);
        let [row, col] = [row_starts[i] + at / block % block, col_starts[j] + at % block];
        (row < row_starts[i + 1] && col < col_starts[j + 1]).then_some([row, col])
    };
    (0..blocks.len() * block * block).map(place).collect()
}
