/* A plugin for QEMU's user-mode emulators: prints how many instructions the emulated program executed, on standard
 * error. Build with the host's C compiler (-shared -fPIC), use with qemu-aarch64 -plugin FILE.
 *
 * Emulators of QEMU 9 and later ask for QEMU_PLUGIN_VERSION 2 or more; what is used here is the same in all versions.
 * Declared here because distributions that ship the emulators do not ship QEMU's qemu-plugin.h.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifndef QEMU_PLUGIN_VERSION
#define QEMU_PLUGIN_VERSION 1
#endif

typedef uint64_t plugin_id;
struct qemu_plugin_tb; /* a translated run of instructions that is left only at its end */
struct qemu_info_t;
enum { kReadsNoRegisters = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* tb, void (*callback)(unsigned vcpu, void* userdata),
                                          int registers, void* userdata);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*callback)(plugin_id, void* userdata), void* userdata);

#define EXPORTED __attribute__((visibility("default")))
EXPORTED int qemu_plugin_version = QEMU_PLUGIN_VERSION;

static uint64_t count; /* of a program with one thread */

static void executed(unsigned vcpu, void* n_instructions) {
  (void)vcpu;
  count += (uintptr_t)n_instructions;
}

static void translated(plugin_id id, struct qemu_plugin_tb* tb) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, kReadsNoRegisters, (void*)(uintptr_t)qemu_plugin_tb_n_insns(tb));
}

static void finished(plugin_id id, void* userdata) {
  (void)id, (void)userdata;
  fprintf(stderr, "instructions %" PRIu64 "\n", count);
}

EXPORTED int qemu_plugin_install(plugin_id id, const struct qemu_info_t* info, int argc, char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finished, NULL);
  return 0;
}
