// The cache's noise, value for value: rule "philox4x64-as241-v1" of advkd.cache.format.noise, where each step is
// explained. Words are pairs of 32-bit halves, because 64-bit integers (BigInt) take a hundred times as long.

const MULTIPLIERS = [[0xd2e7470e, 0xe14c6c93], [0xca5a8263, 0x95121157]];
const WEYL = [[0x9e3779b9, 0x7f4a7c15], [0xbb67ae85, 0x84caa73b]];
const ROUNDS = 10;

// 32 × 32 → 64 bits as [high, low]: both partial products are below 2⁴⁸, which a double holds exactly.
function product(a, b) {
  const low = (a & 0xffff) * b;
  const high = (a >>> 16) * b;
  const sum = low + (high % 0x10000) * 0x10000;
  return [Math.floor(high / 0x10000) + Math.floor(sum / 0x100000000), sum >>> 0];
}

// 64 × 64 → 128 bits as [highest, …, lowest].
function multiply([a1, a0], [b1, b0]) {
  const [c1, c0] = product(a0, b0);
  const [d1, d0] = product(a0, b1);
  const [e1, e0] = product(a1, b0);
  const [f1, f0] = product(a1, b1);
  const second = c1 + d0 + e0;
  const third = d1 + e1 + f0 + Math.floor(second / 0x100000000);
  return [(f1 + Math.floor(third / 0x100000000)) >>> 0, third >>> 0, second >>> 0, c0];
}

function add([a1, a0], [b1, b0]) {
  const low = a0 + b0;
  return [(a1 + b1 + (low > 0xffffffff ? 1 : 0)) >>> 0, low >>> 0];
}

// Four words, each [high, low], of Philox4x64-10 (Salmon et al., SC 2011).
function philox(counter, key) {
  let [x0, x1, x2, x3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < ROUNDS; round++) {
    const p = multiply(MULTIPLIERS[0], x0);
    const q = multiply(MULTIPLIERS[1], x2);
    [x0, x1, x2, x3] = [
      [(q[0] ^ x1[0] ^ k0[0]) >>> 0, (q[1] ^ x1[1] ^ k0[1]) >>> 0], [q[2], q[3]],
      [(p[0] ^ x3[0] ^ k1[0]) >>> 0, (p[1] ^ x3[1] ^ k1[1]) >>> 0], [p[2], p[3]],
    ];
    k0 = add(k0, WEYL[0]);
    k1 = add(k1, WEYL[1]);
  }
  return [x0, x1, x2, x3];
}

// AS 241, PPND16: numerator and denominator, highest power first, for |q| ≤ 0.425, 1.6 < r ≤ 5 and r > 5.
const CENTRAL = [
  [2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
   13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608],
  [5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
   5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0],
];
const MIDDLE = [
  [7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
   3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734],
  [1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
   0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0],
];
const TAIL = [
  [2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
   0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772],
  [2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
   0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0],
];
const LN2 = 0.6931471805599453;
const SQRT_HALF = 0.7071067811865476;
const ODD_POWERS = Array.from({length: 12}, (_, index) => 1 / (23 - 2 * index));

function horner(coefficients, x) {
  let total = coefficients[0];
  for (let index = 1; index < coefficients.length; index++) total = total * x + coefficients[index];
  return total;
}

const ratio = ([numerator, denominator], x) => horner(numerator, x) / horner(denominator, x);

const double = new Float64Array(1);
const halves = new Uint32Array(double.buffer); // low half first: every machine with a browser is little-endian

// ln x of a normal double. Math.log differs between browsers, + − × ÷ don't.
function logarithm(x) {
  double[0] = x;
  let exponent = (halves[1] >>> 20) - 1022;
  halves[1] = (halves[1] & 0x000fffff) | (1022 << 20);
  let mantissa = double[0]; // in [½, 1)
  if (mantissa < SQRT_HALF) {
    mantissa *= 2;
    exponent -= 1;
  }
  const s = (mantissa - 1) / (mantissa + 1);
  return exponent * LN2 + 2 * s * horner(ODD_POWERS, s * s);
}

// Φ⁻¹(u) for u in (0, 1).
export function inverseNormalCdf(u) {
  const q = u - 0.5;
  if (Math.abs(q) <= 0.425) return (q * horner(CENTRAL[0], 0.180625 - q * q)) / horner(CENTRAL[1], 0.180625 - q * q);
  const root = Math.sqrt(-logarithm(Math.min(u, 1 - u)));
  const z = root > 5 ? ratio(TAIL, root - 5) : ratio(MIDDLE, root - 1.6);
  return q < 0 ? -z : z;
}

const FLOATS = {float16: {bits: 10, least: -14}, bfloat16: {bits: 7, least: -126}};
const TO_INTEGER = 1.5 * 2 ** 52; // adding and subtracting it rounds to the nearest integer, ties to even

// The nearest value of a smaller float, ties to even; float32 as it is.
export function rounded(value, dtype) {
  if (!(dtype in FLOATS)) return value;
  double[0] = value;
  const exponent = Math.max(((halves[1] >>> 20) & 0x7ff) - 1023, FLOATS[dtype].least);
  const unit = 2 ** (exponent - FLOATS[dtype].bits);
  return (value / unit + TO_INTEGER - TO_INTEGER) * unit;
}

const word = (value) => [Math.floor(value / 0x100000000) >>> 0, value % 0x100000000 >>> 0];

// x_T of some seeds (safe integers): Float32Array of seeds.length × size values.
// rootSeed: decimal digits, for it may exceed a double's 53 bits.
export function standardNormal(rootSeed, seeds, size, dtype = "float32") {
  const root = BigInt(rootSeed);
  const key = [[Number(root >> 32n), Number(root & 0xffffffffn)], [0, 0]];
  const values = new Float32Array(seeds.length * size);
  seeds.forEach((seed, row) => {
    for (let first = 0; first < size; first += 4) {
      // NumPy's generator counts before it draws: the first block of a row has counter 1.
      const words = philox([word(first / 4 + 1), [0, 0], word(seed), [0, 0]], key);
      for (let lane = 0; lane < 4 && first + lane < size; lane++) {
        const [high, low] = words[lane];
        const u = (high * 0x100000 + (low >>> 12) + 0.5) * 2 ** -52;
        values[row * size + first + lane] = rounded(Math.fround(inverseNormalCdf(u)), dtype);
      }
    }
  });
  return values;
}
