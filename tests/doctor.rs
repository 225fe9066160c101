//! The doctor, called as a function: every kernel that ships against the CPU.
#![cfg(feature = "cuda")]

#[allow(dead_code)] // `main`
#[path = "../examples/doctor.rs"]
mod doctor;

/// On the emulator all is well, and that every kernel was launched is part of it.
#[test]
fn every_kernel_agrees_with_the_cpu() {
    if !dropless_kit::device::hardware_only() {
        assert_eq!(doctor::run(&["--emulated"]), 0);
    }
}

#[test]
fn without_a_gpu_something_is_missing() {
    let want = u8::from(dropless_kit::device::hardware().is_none());
    assert_eq!(doctor::run(&[]), want);
    assert_eq!(doctor::run(&["--emulate"]), 2);
}
