//! What a checkpoint must hold: tensors by name, shape, and what they are for.

use dropless::layout::WeightOrder;

/// What a tensor is for: parameters are counted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Embedding,
    Attention,
    Router,
    Experts,
    SharedExpert,
    Dense,
    Norms,
    Head,
}

impl Part {
    /// In the order in which a token meets them.
    pub const ALL: [Part; 8] =
        [Part::Embedding, Part::Attention, Part::Router, Part::Experts, Part::SharedExpert, Part::Dense, Part::Norms, Part::Head];

    /// Its line in a report.
    pub fn title(self) -> &'static str {
        match self {
            Part::Embedding => "embedding",
            Part::Attention => "attention",
            Part::Router => "router",
            Part::Experts => "experts",
            Part::SharedExpert => "shared expert",
            Part::Dense => "dense",
            Part::Norms => "norms",
            Part::Head => "head",
        }
    }
}

/// One matrix, or one for each expert: in a tensor of its own, or all in one.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub part: Part,
    /// The tensor's name. With a tensor for each expert, `{}` stands for its number.
    pattern: String,
    /// Tensors, all of one shape.
    pub tensors: usize,
    pub shape: Vec<usize>,
    /// Matrices in all tensors together.
    pub matrices: usize,
    /// `[N, K]`, or `[K, N]`, of N outputs and K inputs.
    pub order: WeightOrder,
    /// Random weights have a variance of one over this. None: they are ones.
    pub inputs: Option<usize>,
    pub kind: Kind,
    /// It is a vector that operations read as f32. A file may have it in another type than its matrices.
    pub is_f32: bool,
    /// Products take the first half of its outputs, and the second.
    pub in_halves: bool,
}

/// What operations take it as, where a file may hold it quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A matrix of products, or the table of an embedding: used as it lies.
    Matrix,
    /// A matrix whose elements are read as floats: what is quantised becomes f32 when it is loaded.
    Floats,
    /// Factors of norms, and what is added: no file has them quantised.
    Vector,
}

impl Spec {
    /// Weights `[N, K]` of N outputs and K inputs.
    pub fn linear(part: Part, name: impl Into<String>, [n, k]: [usize; 2]) -> Spec {
        Spec {
            part,
            pattern: name.into(),
            tensors: 1,
            shape: vec![n, k],
            matrices: 1,
            order: WeightOrder::Nk,
            inputs: Some(k),
            kind: if part == Part::Router { Kind::Floats } else { Kind::Matrix },
            is_f32: false,
            in_halves: false,
        }
    }

    /// Weights `[N, K]` for each expert, in tensors of their own; `{}` in the name is the expert's number.
    pub fn each(part: Part, name: impl Into<String>, num_experts: usize, dims: [usize; 2]) -> Spec {
        Spec { tensors: num_experts, matrices: num_experts, ..Spec::linear(part, name, dims) }
    }

    /// Weights of all experts in one tensor, `[E, N, K]`.
    pub fn stacked(part: Part, name: impl Into<String>, num_experts: usize, [n, k]: [usize; 2]) -> Spec {
        Spec { shape: vec![num_experts, n, k], matrices: num_experts, ..Spec::linear(part, name, [n, k]) }
    }

    /// The same with inputs before outputs, `[E, K, N]`.
    pub fn stacked_kn(part: Part, name: impl Into<String>, num_experts: usize, [k, n]: [usize; 2]) -> Spec {
        Spec { order: WeightOrder::Kn, inputs: Some(k), ..Spec::stacked(part, name, num_experts, [k, n]) }
    }

    /// The same tensor without a dimension for the experts in its shape: `[E N, K]` or `[E K, N]`.
    pub fn flat(self) -> Spec {
        let [rows, cols] = self.dims();
        Spec { shape: vec![rows, cols], ..self }
    }

    /// An embedding `[V, D]`, which is looked up, not multiplied.
    pub fn embedding(name: impl Into<String>, dims: [usize; 2]) -> Spec {
        Spec { inputs: Some(1), ..Spec::linear(Part::Embedding, name, dims) }
    }

    /// Factors of a norm, `[D]`.
    pub fn norm(name: impl Into<String>, len: usize) -> Spec {
        Spec { inputs: None, ..Spec::bias(Part::Norms, name, len) }
    }

    /// What is added to outputs, `[N]`.
    pub fn bias(part: Part, name: impl Into<String>, len: usize) -> Spec {
        Spec { shape: vec![len], inputs: Some(len), kind: Kind::Vector, ..Spec::linear(part, name, [1, len]) }
    }

    /// The same for each expert, `[E, N]`.
    pub fn biases(part: Part, name: impl Into<String>, dims: [usize; 2]) -> Spec {
        Spec { kind: Kind::Vector, ..Spec::linear(part, name, dims) }
    }

    /// A matrix whose elements are read as floats.
    pub fn read_as_floats(self) -> Spec {
        Spec { kind: Kind::Floats, ..self }
    }

    /// Read as f32, of whichever type it is in the file.
    pub fn read_as_f32(self) -> Spec {
        Spec { is_f32: true, ..self }
    }

    /// Of outputs that products take as two halves.
    pub fn in_halves(self) -> Spec {
        Spec { in_halves: true, ..self }
    }

    /// The name of the first tensor, by which the matrix is found.
    pub fn name(&self) -> String {
        self.tensor(0)
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        (0..self.tensors).map(|number| self.tensor(number))
    }

    fn tensor(&self, number: usize) -> String {
        self.pattern.replacen("{}", &number.to_string(), 1)
    }

    /// Each tensor as a matrix: a vector is one row, and experts lie one below the other.
    pub fn dims(&self) -> [usize; 2] {
        let (cols, rows) = self.shape.split_last().expect("a tensor has a dimension");
        [rows.iter().product(), *cols]
    }

    /// All tensors, one below the other.
    pub fn stacked_dims(&self) -> [usize; 2] {
        let [rows, cols] = self.dims();
        [self.tensors * rows, cols]
    }

    /// Matrices of each tensor, and their outputs and inputs.
    pub fn matrix_dims(&self) -> (usize, [usize; 2]) {
        let (count, [rows, cols]) = ((self.matrices / self.tensors.max(1)).max(1), self.dims());
        let dims = match self.order {
            WeightOrder::Nk => [rows / count, cols],
            WeightOrder::Kn => [cols, rows / count],
        };
        (count, dims)
    }

    /// Parameters of all tensors, or none beyond 2^127.
    pub fn elements(&self) -> Option<u128> {
        let sizes = self.shape.iter().map(|size| *size as u128);
        sizes.chain([self.tensors as u128]).try_fold(1u128, u128::checked_mul)
    }
}
