//! The most that the card does in this process: a large product, and a copy.

use dropless::{Bf16, Buffer, ExpertRows, ExpertWeights, TokenIds, embedding, grouped_gemm};

use super::drawn::Table;
use super::record::{At, Failure, Meter, Record};

/// Rows and columns of the product on a GPU.
pub const N: usize = 8192;
/// Rows of the copy on a GPU: 512 MiB, ten times the L2 cache.
const COPIED: usize = 32768;

/// Measures both, with numbers of a table that has rows of `n`.
pub fn measure(meter: Meter<'_>, table: &Table, n: usize, record: &mut Record) {
    let flop = 2.0 * (n as f64).powi(3);
    record.ceiling(&At { what: "matmul", form: "grouped_gemm::nt", tokens: n, flop, ..At::default() }, || product(meter, table, n));
    let rows = if meter.emulated { 2 * n } else { COPIED };
    let bytes = (4 * rows * n) as f64;
    record.ceiling(&At { what: "copy", form: "embedding::lookup", bytes, ..At::default() }, || copy(meter, table, rows, n));
}

/// One expert that has all rows.
fn product(meter: Meter<'_>, table: &Table, n: usize) -> Result<super::record::Figure, Failure> {
    let stream = meter.stream;
    let [x, w] = [table.drawn(stream, 21, n, n)?, table.drawn(stream, 22, n, n)?];
    let mut y = Buffer::<Bf16>::zeros(stream, n * n)?;
    let call = |y: &mut Buffer<Bf16>| {
        grouped_gemm::nt(stream, x.rows()?, ExpertWeights::nk(w.rows()?, 1)?, ExpertRows::dense(n)?, &mut y.rows_mut(n, n)?)
    };
    meter.measure(&mut y, true, &mut None, call, |_| Ok(()))
}

/// Rows that are looked up in their order.
fn copy(meter: Meter<'_>, table: &Table, rows: usize, n: usize) -> Result<super::record::Figure, Failure> {
    let stream = meter.stream;
    let source = table.drawn(stream, 23, rows, n)?;
    let (ids, mut on_device): (Vec<u32>, _) = ((0..rows as u32).collect(), Buffer::zeros(stream, rows)?);
    let ids = TokenIds::from_host(stream, &ids, rows, &mut on_device)?;
    let mut target = Buffer::<Bf16>::zeros(stream, rows * n)?;
    let call = |target: &mut Buffer<Bf16>| embedding::lookup(stream, ids, source.rows()?, &mut target.rows_mut(rows, n)?);
    meter.measure(&mut target, true, &mut None, call, |target| {
        let same = |row: usize| target[row * n..][..n].iter().zip(source.row(table, row)).all(|(got, want)| got.0 == want.0);
        if [0, rows / 2, rows - 1].into_iter().all(same) { Ok(()) } else { Err("a row is not copied".into()) }
    })
}
