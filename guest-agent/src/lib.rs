//! What programs inside an Ebb guest use: the arena, memory that is freed and taken back without a call.

pub mod arena;
