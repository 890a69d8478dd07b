//! `--rng-limits`: how many random bytes a guest gets.

use clap::Args;

use super::keys::Keys;
use super::rate::Rate;

/// `--rng-limits`: how many random bytes a guest gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
#[command(rename_all = "snake_case")]
pub struct RngLimits {
    /// Limit of the bytes: SIZE in MS milliseconds (1000), and once BURST more
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub bw: Option<Rate>,
    /// Limit of the requests, in the same form
    #[arg(long, value_name = "N/MS+BURST")]
    pub ops: Option<Rate>,
}

impl Keys for RngLimits {}
