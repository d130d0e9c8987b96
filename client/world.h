/* Which world this process belongs to, and starting one.
 *
 *   under mpirun                          join that world
 *   in a Slurm allocation of several      start mpirun over the allocation
 *   --workers N > 1                       start mpirun on this machine
 *   otherwise                             a world of one, without MPI
 *
 * Where this process starts mpirun it becomes the parent: it passes standard output and the workers' sentences on,
 * keeps mpirun's banners to itself unless they are all there is, answers Ctrl-C, and leaves nothing behind. */
#ifndef LR_CLIENT_WORLD_H
#define LR_CLIENT_WORLD_H

#include "client/settings.h"

enum lr_world { LR_WORLD_SELF, LR_WORLD_JOIN, LR_WORLD_LOCAL, LR_WORLD_SLURM };

/* LR_INVALID where the environment contradicts itself (started by srun, --workers against the world's size). */
LR_MUST_USE enum lr_status
lr_world_find(const struct lr_settings *settings, enum lr_world *world, struct lr_error *err);

/* The rank that the environment gives this process, before MPI is started; 0 outside of a world. */
int lr_world_rank(void);

/* Runs `argv` again in every worker of a new world and waits for its end. Returns the exit code. `reads_stdin`: worker
 * 0 gets this process's standard input. */
int lr_world_launch(const struct lr_settings *settings, enum lr_world world, int reads_stdin, int argc, char **argv);

/* Set for the workers of a world that lr_world_launch started: how wide the terminal is, 0 where there is none. */
int lr_world_terminal_columns(void);

#endif
