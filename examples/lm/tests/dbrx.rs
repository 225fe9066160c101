//! The example `dbrx`, called as a function: its results against reference results, and everything it refuses.
//!
//! A subset of the reference checkpoints lies in `tests/data`; where `DROPLESS_GOLDENS` names the folder of
//! the full set, all of them run. `mixtral` holds what is said of the second family, `families` of each other
//! one, `hostile` what they refuse, `quantized` and `gguf` what is said of such weights, `copies` what is said
//! of them on a GPU; the rest is said of DBRX, or of all.

#[path = "dbrx/copies.rs"]
mod copies;
#[path = "dbrx/devices.rs"]
mod devices;
#[path = "dbrx/emulated.rs"]
mod emulated;
#[path = "dbrx/families.rs"]
mod families;
#[path = "dbrx/fixture.rs"]
mod fixture;
#[path = "dbrx/gguf.rs"]
mod gguf;
#[path = "dbrx/hostile.rs"]
mod hostile;
#[path = "dbrx/mixtral.rs"]
mod mixtral;
#[path = "dbrx/quantized.rs"]
mod quantized;
#[path = "dbrx/refusals.rs"]
mod refusals;
#[path = "dbrx/results.rs"]
mod results;
#[path = "dbrx/rounded.rs"]
mod rounded;
#[path = "dbrx/sampling.rs"]
mod sampling;
#[path = "dbrx/shapes.rs"]
mod shapes;

use dropless_lm::run as example;
