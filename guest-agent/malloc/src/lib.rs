//! `libebb_malloc.so`: replaces malloc(3), fork(3) and one option of prctl(2) by those of `ebb-heap`, for LD_PRELOAD.

use std::ffi::{c_int, c_ulong, c_void};
use std::ptr::null_mut;

use libc::{EINVAL, ENOMEM, size_t};

const PAGE_SIZE: usize = 4096;

fn fail(code: c_int) -> *mut c_void {
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() = code };
    null_mut()
}

/// malloc(3).
///
/// # Safety
/// As malloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::malloc(size) }
}

/// calloc(3).
///
/// # Safety
/// As calloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(count: size_t, size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::calloc(count, size) }
}

/// realloc(3).
///
/// # Safety
/// As realloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(memory: *mut c_void, size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::realloc(memory, size) }
}

/// reallocarray(3).
///
/// # Safety
/// As reallocarray(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(
    memory: *mut c_void,
    count: size_t,
    size: size_t,
) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: the caller's promise.
        Some(total) => unsafe { ebb_heap::realloc(memory, total) },
        None => fail(ENOMEM),
    }
}

/// free(3).
///
/// # Safety
/// As free(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(memory: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::free(memory) }
}

/// posix_memalign(3).
///
/// # Safety
/// As posix_memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(
    memory: *mut *mut c_void,
    align: size_t,
    size: size_t,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::posix_memalign(memory, align, size) }
}

/// aligned_alloc(3).
///
/// # Safety
/// As aligned_alloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aligned_alloc(align: size_t, size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::aligned_alloc(align, size) }
}

/// memalign(3).
///
/// # Safety
/// As memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memalign(align: size_t, size: size_t) -> *mut c_void {
    let Some(align) = align.checked_next_power_of_two() else {
        return fail(EINVAL);
    };
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::aligned_alloc(align.max(size_of::<usize>()), size) }
}

/// valloc(3).
///
/// # Safety
/// As valloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn valloc(size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::aligned_alloc(PAGE_SIZE, size) }
}

/// pvalloc(3).
///
/// # Safety
/// As pvalloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvalloc(size: size_t) -> *mut c_void {
    match size.checked_next_multiple_of(PAGE_SIZE) {
        // SAFETY: the caller's promise.
        Some(size) => unsafe { ebb_heap::aligned_alloc(PAGE_SIZE, size) },
        None => fail(ENOMEM),
    }
}

/// malloc_usable_size(3).
///
/// # Safety
/// As malloc_usable_size(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(memory: *mut c_void) -> size_t {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::usable_size(memory) }
}

/// The C library's own function of this name.
///
/// # Safety
/// `F` is the function's type.
unsafe fn libc_function<F: Copy>(name: &std::ffi::CStr) -> F {
    // SAFETY: looks up a name.
    let function = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    assert!(!function.is_null(), "{name:?} is not in the C library");
    // SAFETY: the caller's promise. Functions are as wide as data pointers.
    unsafe { std::mem::transmute_copy(&function) }
}

type Fork = extern "C" fn() -> c_int;
/// The variadic prctl(2): glibc always reads four arguments of one word.
type Prctl = unsafe extern "C" fn(c_int, c_ulong, c_ulong, c_ulong, c_ulong) -> c_int;

/// prctl(2), but PR_SET_THP_DISABLE succeeds without effect if the heap is in an arena.
///
/// device-dax has huge pages only: without them an access fails with SIGBUS. Redis disables them to make its forks cheaper,
/// which does not matter here, because a fork copies the heap.
///
/// # Safety
/// As prctl(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(
    option: c_int,
    second: c_ulong,
    third: c_ulong,
    fourth: c_ulong,
    fifth: c_ulong,
) -> c_int {
    if option == libc::PR_SET_THP_DISABLE && ebb_heap::uses_arena() {
        return 0;
    }
    // SAFETY: its type.
    let prctl: Prctl = unsafe { libc_function(c"prctl") };
    // SAFETY: the caller's promise.
    unsafe { prctl(option, second, third, fourth, fifth) }
}

/// fork(3). Fails with ENOMEM if the heap cannot be copied.
#[unsafe(no_mangle)]
pub extern "C" fn fork() -> c_int {
    // SAFETY: its type.
    let fork: Fork = unsafe { libc_function(c"fork") };
    ebb_heap::fork::fork(|| fork())
}

/// _Fork(3). It runs no fork handlers, so we run ours.
#[unsafe(no_mangle)]
pub extern "C" fn _Fork() -> c_int {
    // SAFETY: its type.
    let fork: Fork = unsafe { libc_function(c"_Fork") };
    ebb_heap::fork::fork(|| {
        ebb_heap::fork::before();
        let child = fork();
        if child == 0 {
            ebb_heap::fork::in_child();
        } else {
            ebb_heap::fork::in_parent();
        }
        child
    })
}
