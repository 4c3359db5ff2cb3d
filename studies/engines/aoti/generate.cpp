// Generate greedily with the programs of an export, from C++ and libtorch alone.
//
//   generate FOLDER TOKEN PROMPT TENSORS HEADS WIDTH NEW_TOKENS ID ID ...
//
// FOLDER is what `autoquant export plan.db --to aoti` wrote for a language model. TOKEN and PROMPT
// are the names of its programs for one token and for as many as the prompt has, and the cache has
// TENSORS tensors of HEADS and WIDTH: all of that is in `program.json`. The ids are those of a
// prompt. Prints the ids of the new tokens, and tokens a second.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <fstream>
#include <iostream>

using torch::inductor::AOTIModelPackageLoader;
using Constants = std::unordered_map<std::string, at::Tensor>;

static c10::Dict<c10::IValue, c10::IValue> weights_of(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  return torch::pickle_load(bytes).toGenericDict();
}

// All programs point at the same weights.
static void give(AOTIModelPackageLoader& program, const std::string& name,
                 const c10::Dict<c10::IValue, c10::IValue>& weights) {
  Constants constants;
  for (const auto& key : program.get_constant_fqns()) {
    const std::string own = name + "/" + key;
    constants[key] = weights.at(weights.contains(own) ? own : key).toTensor();
  }
  program.load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true,
                         /*user_managed=*/true);
}

int main(int argc, char** argv) {
  c10::InferenceMode guard;
  if (argc < 9) {
    std::cerr << "generate FOLDER TOKEN PROMPT TENSORS HEADS WIDTH NEW_TOKENS ID ID ...\n";
    return 2;
  }
  const std::string folder = argv[1], token_name = argv[2], prompt_name = argv[3];
  const int64_t tensors = std::stoll(argv[4]), heads = std::stoll(argv[5]);
  const int64_t width = std::stoll(argv[6]), most = std::stoll(argv[7]);
  std::vector<int64_t> prompt;
  for (int i = 8; i < argc; i++) prompt.push_back(std::stoll(argv[i]));
  // The project's operators. An export without any of them has no such file.
  dlopen((folder + "/libautoquant_cpu.so").c_str(), RTLD_NOW | RTLD_GLOBAL);
  const int64_t places = (prompt.size() + most + 15) / 16 * 16;
  std::vector<at::Tensor> cache;
  for (int64_t i = 0; i < tensors; i++)
    cache.push_back(at::zeros({1, heads, places, width}, at::kBFloat16));

  const auto weights = weights_of(folder + "/weights.pt");
  AOTIModelPackageLoader token(folder + "/model.pt2", token_name);
  AOTIModelPackageLoader chunk(folder + "/model.pt2", prompt_name);
  give(token, token_name, weights);
  give(chunk, prompt_name, weights);

  auto step = [&](AOTIModelPackageLoader& program, const at::Tensor& ids, int64_t filled) {
    std::vector<at::Tensor> inputs{ids, at::scalar_tensor(filled, at::kLong)};
    inputs.insert(inputs.end(), cache.begin(), cache.end());
    return program.run(inputs)[0].argmax(-1, true);
  };
  for (int round = 0; round < 2; round++) {  // the first one reads the weights
    std::vector<int64_t> made;
    at::Tensor next = step(chunk, at::tensor(prompt, at::kLong).unsqueeze(0), 0);
    made.push_back(next.item<int64_t>());
    const auto started = std::chrono::steady_clock::now();
    while ((int64_t)made.size() < most) {
      next = step(token, next, prompt.size() + made.size() - 1);
      made.push_back(next.item<int64_t>());
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
    if (round == 0) continue;
    for (int64_t id : made) std::cout << id << " ";
    std::cout << "\n" << (most - 1) / took.count() << " tokens/s\n";
  }
}
