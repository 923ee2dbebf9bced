// A kernel whose counts are known by hand, for tests/tools/test_walk.py. sample.sass is its machine code for sm_90:
//     nvcc -std=c++17 -O3 --fmad=false -arch=sm_90 -cubin -o sample.cubin sample.cu && cuobjdump -sass sample.cubin
struct Arguments {
  const float4* x;
  float* y;
  const float* scale;  // null: nothing to be done about it
  int rows, lanes, vectors;
};

// `lanes` threads share a row of so many vectors of four; every thread takes one vector of every (64 / lanes)-th row.
__global__ void __launch_bounds__(64) sample(Arguments a) {
  __shared__ float shared[64];
  const int x = static_cast<int>(threadIdx.x) % a.lanes, y = static_cast<int>(threadIdx.x) / a.lanes;
  float sum = 0;
#pragma unroll 1
  for (int row = y; row < a.rows; row += 64 / a.lanes) {
    if (x >= a.vectors) continue;
    const float4 v = a.x[row * a.vectors + x];
    float r = sqrtf(v.x) + v.y + v.z + v.w;  // one root
    if (a.scale) r *= *a.scale;
    sum += r;
  }
  shared[threadIdx.x] = sum + __shfl_xor_sync(0xffffffffu, sum, 1);
  __syncthreads();
  a.y[blockIdx.x * 64 + threadIdx.x] = sum / shared[63 - threadIdx.x];  // one quotient
}
