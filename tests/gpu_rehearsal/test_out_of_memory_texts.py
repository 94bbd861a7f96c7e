"""What allocators, libraries and collectives say when memory runs out or a worker is lost."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from orchestrator.training.workers.failures import describe
from strategies.step.out_of_memory import is_out_of_memory, run_in_halves


def accelerator_error(text):
    """CUDA's runtime errors since torch 2.8."""
    error = torch.AcceleratorError.__new__(torch.AcceleratorError)
    error.args = (text,)
    return error


def raised_from(cause):
    error = ValueError("the model cannot be loaded")
    error.__cause__ = cause
    return error


def raised_while_handling(context):
    error = ValueError("the model cannot be loaded")
    error.__context__ = context
    return error


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB"),
    accelerator_error("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("NCCL Error 1: unhandled cuda error: Cuda failure 2 'out of memory'"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("rocblas error: rocblas_status_memory_error"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.98 GiB, max allowed: 9.07 GiB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("unable to mmap 4976698672 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("hipErrorOutOfMemory"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("NCCL error: Failed to CUDA calloc 4194304 bytes"),
    RuntimeError("NCCL WARN Failed to CUDA host alloc 65536 bytes"),
    SafetensorError("Error while deserializing header: Cannot allocate memory (os error 12)"),
    raised_while_handling(torch.OutOfMemoryError("CUDA out of memory")),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    raised_from(RuntimeError("CUDA error: out of memory")),
]
NOT_FULL = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 16x4)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
    ValueError("std::bad_alloc"),
    OSError(errno.ENOSPC, "No space left on device"),
    None,
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_every_form_of_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", NOT_FULL, ids=str)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


LOST = [
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41287"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:525] Read error [10.0.0.2]:80: Connection reset by peer"),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv"),
    RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:137] Timed out waiting 60000ms for send"),
    torch.distributed.DistStoreError("wait timeout after 60000ms, keys: /default_pg/0//rank_1"),
    torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
    torch.distributed.DistNetworkError("The client socket has timed out after 60000ms while trying to connect"),
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version"
        " 2.28.9\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    ),
    torch.distributed.DistBackendError(
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 60021 ms"
    ),
]
OWN = [
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage, NCCL version 2.28.9\nDuplicate GPU detected : rank 0"
        " and rank 1 both on CUDA device 1000"
    ),
    RuntimeError("NCCL Error 1: unhandled cuda error: Cuda failure 2 'out of memory'"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("cannot restore the RNG state"),
    RuntimeError("Found no NVIDIA driver on your system."),
    RuntimeError("No backend type associated with device type cuda and gloo"),
    ConnectionResetError(104, "Connection reset by peer"),  # of a download, not of a collective
    OSError("We couldn't connect to the hub: Read timed out."),
    KeyError("store"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_worker_that_is_gone_or_silent_is_told_of_as_that(error):
    assert describe(error) == "another worker stopped answering"


@pytest.mark.parametrize("error", OWN, ids=str)
def test_a_workers_own_error_is_reported_as_it_is(error):
    assert describe(error) == f"{type(error).__name__}: {error}"


def test_a_batch_that_does_not_fit_is_halved_with_all_that_follow_and_what_never_fits_is_named():
    done, tried = [], []

    def run(batch):
        tried.append(len(batch))
        if len(batch) > 2 or 7 in batch:
            raise MemoryError("no room")
        done.extend(batch)

    unfit, reason = run_in_halves([[0, 1, 2, 3, 4], [5, 6, 7, 8]], run)

    assert sorted(done) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert (unfit, reason) == ([7], "no room")
    assert tried[:2] == [5, 2] and max(tried[1:]) == 2


def test_an_error_of_another_kind_is_not_tried_again():
    calls = []

    def run(batch):
        calls.append(batch)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run_in_halves([[1, 2]], run)
    assert calls == [[1, 2]]
