// The choice of an instruction set, and names. Runs the choices that must fail in child processes, because a process
// reads FASTERNET_KERNELS_ISA once.
#include <sys/wait.h>
#include <unistd.h>

#include <stdexcept>

#include "testing.h"

namespace {

using namespace testing;

// Exit status of a child in which FASTERNET_KERNELS_ISA is `name`: 0 if selected_isa() throws std::runtime_error with a
// message that names it.
int selecting(const std::string& name) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    setenv("FASTERNET_KERNELS_ISA", name.c_str(), 1);
    int status = 1;
    try {
      fasternet::selected_isa();
    } catch (const std::runtime_error& error) {
      status = std::string(error.what()).find(name) != std::string::npos ? 0 : 2;
    } catch (...) {
      status = 3;
    }
    _exit(status);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return 4;
  return WEXITSTATUS(status);
}

void test_unusable_isa_is_refused() {
  // Before anything in this process has asked for the instruction set, or the children would inherit the answer.
  const std::vector<Isa> available = fasternet::available_isas();
  std::vector<std::string> names = {"no_such_isa", "AVX-1024", "avx"};
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kNeon}) {
    if (std::find(available.begin(), available.end(), isa) == available.end()) {
      names.push_back(fasternet::isa_name(isa));
    }
  }
  for (const std::string& name : names) {
    const int status = selecting(name);
    check(status == 0, "FASTERNET_KERNELS_ISA=" + name,
          status == 1   ? "selected_isa() did not throw"
          : status == 2 ? "the message does not name it"
                        : "selected_isa() did not throw std::runtime_error");
  }
}

void test_available_isas() {
  const std::vector<Isa> available = fasternet::available_isas();
  check(!available.empty() && available.front() == Isa::kGeneric, "available_isas", "generic must come first");
  check(std::is_sorted(available.begin(), available.end()), "available_isas", "must be slowest first");
  const Isa selected = fasternet::selected_isa();
  const char* wanted = std::getenv("FASTERNET_KERNELS_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    check(fasternet::isa_name(selected) == std::string(wanted), "selected_isa", "not the one the environment names");
  } else {
    check(selected == available.back(), "selected_isa", "not the fastest one");
  }
}

void test_names() {
  check(fasternet::isa_name(Isa::kGeneric) == std::string("generic"), "isa_name", "generic");
  check(fasternet::isa_name(Isa::kAvx2) == std::string("avx2"), "isa_name", "avx2");
  check(fasternet::isa_name(Isa::kAvx512) == std::string("avx512"), "isa_name", "avx512");
  check(fasternet::isa_name(Isa::kNeon) == std::string("neon"), "isa_name", "neon");
  check(!fasternet::compiler().empty(), "compiler", "empty");
  for (Act act : all_acts()) check(fasternet::parse_act(act_name(act)) == act, "parse_act", act_name(act));
  for (const char* name : {"", "RELU", "relu ", "tanh"}) {
    bool thrown = false;
    try {
      fasternet::parse_act(name);
    } catch (const std::invalid_argument& error) {
      thrown = std::string(error.what()).find(name) != std::string::npos;
    }
    check(thrown, "parse_act", std::string("must refuse, and name, '") + name + "'");
  }
}

void test_fma_peak() {
  for (double seconds : {1e-6, 2e-3}) {
    const double peak = fasternet::fma_peak(seconds, fasternet::serial());
    // No lower bound: this may run on an emulator, and be suspended in between.
    check(peak > 0 && peak < 1e13, "fma_peak", "is " + std::to_string(peak) + " operations per second");
  }
}

}  // namespace

int main() {
  test_unusable_isa_is_refused();
  return run_tests("test_isa", [] {
    test_available_isas();
    test_names();
    test_fma_peak();
  });
}
