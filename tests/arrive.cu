// The loop by which the PTX manual explains bar.arrive: a warp writes what another reads, and each announces it at a barrier
// where only the other waits. tests/test_gpu.py looks at what racecheck makes of it.

__device__ void sync(int barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }
__device__ void arrive(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }

enum { WRITTEN = 1, READ, TURNS = 4 };

__global__ void loop(int *out) {
  __shared__ int numbers[32];
  int lane = threadIdx.x % 32;
  for (int turn = 0; turn < TURNS; turn++) {
    if (threadIdx.x < 32) {
      if (turn > 0) sync(READ);
      numbers[lane] = turn;
      arrive(WRITTEN);
    } else {
      long long start = clock64();
      while (clock64() - start < 30000);
      sync(WRITTEN);
      out[lane] = numbers[31 - lane];
      if (turn < TURNS - 1) arrive(READ);
    }
  }
}

int main() {
  int *out;
  cudaMalloc(&out, 32 * sizeof(int));
  loop<<<8, 64>>>(out);
  return cudaDeviceSynchronize();
}
