//! Large matrices of normal numbers, made on the device from few rows, so that the host knows each row of
//! them.

use dropless::{Bf16, Buffer, Error, Rows, Stream, TokenIds, embedding};
use dropless_kit::fill::{Random, normal};

/// Rows that are drawn from.
const TABLE_ROWS: usize = 4096;

/// The numbers that rows are drawn from, on both sides.
pub struct Table {
    pub host: Vec<Bf16>,
    on_device: Buffer<Bf16>,
}

impl Table {
    /// Normal numbers of standard deviation `scale`, for rows of at most `cols`.
    pub fn new(stream: &Stream, cols: usize, scale: f64) -> Result<Table, Error> {
        let host = normal::<Bf16>(1, TABLE_ROWS * cols, scale);
        Ok(Table { on_device: Buffer::from_slice(stream, &host)?, host })
    }

    /// `rows` of the table's rows, by chance.
    pub fn drawn(&self, stream: &Stream, seed: u64, rows: usize, cols: usize) -> Result<Drawn, Error> {
        let mut random = Random::new(seed);
        self.rows_of(stream, (0..rows).map(|_| Table::any(&mut random)).collect(), cols)
    }

    /// A number of one of the table's rows.
    pub fn any(random: &mut Random) -> u32 {
        random.below(TABLE_ROWS) as u32
    }

    /// The rows of these numbers.
    pub fn rows_of(&self, stream: &Stream, ids: Vec<u32>, cols: usize) -> Result<Drawn, Error> {
        let rows = ids.len();
        let (mut buffer, mut on_device) = (Buffer::zeros(stream, rows * cols)?, Buffer::zeros(stream, rows)?);
        let tokens = TokenIds::from_host(stream, &ids, TABLE_ROWS, &mut on_device)?;
        embedding::lookup(stream, tokens, self.on_device.rows(TABLE_ROWS, cols)?, &mut buffer.rows_mut(rows, cols)?)?;
        Ok(Drawn { buffer, ids, cols })
    }
}

/// Rows of a table on the device, and which ones they are.
pub struct Drawn {
    pub buffer: Buffer<Bf16>,
    ids: Vec<u32>,
    cols: usize,
}

impl Drawn {
    /// All of it.
    pub fn rows(&self) -> Result<Rows<'_, Bf16>, Error> {
        self.buffer.rows(self.ids.len(), self.cols)
    }

    /// A row as the host has it.
    pub fn row<'a>(&self, table: &'a Table, row: usize) -> &'a [Bf16] {
        &table.host[self.ids[row] as usize * self.cols..][..self.cols]
    }
}
