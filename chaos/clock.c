/* A clock that is wrong, and jumps: preloaded into a program, it adds the seconds that stand in the
 * file CLOCK_FILE (a long, read anew each time) to the time of day.
 *
 * The monotonic clock stays as it is, as on a machine whose clock is set. Whoever waits until a time
 * of day has asked this clock for it, but the kernel waits by its own: so deadlines are taken back.
 * libfaketime 0.9.10 (Debian 12) doesn't do that for all of them, and threads wait for ever.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* No machine has been up for so long: what is later is a time of day. */
#define TIME_OF_DAY_S 1000000000L

static long wrong_by_s(void) {
  static const volatile long *offset;
  if (!offset) {
    const char *name = getenv("CLOCK_FILE");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    void *found = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    static const volatile long right = 0;
    offset = found == MAP_FAILED ? &right : found;
    if (file >= 0) close(file);
  }
  return *offset;
}

static struct timespec by_the_kernel(const struct timespec *deadline) {
  struct timespec found = *deadline;
  if (found.tv_sec > TIME_OF_DAY_S) found.tv_sec -= wrong_by_s();
  return found;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int clock_gettime(clockid_t id, struct timespec *now) {
  static __typeof__(&clock_gettime) real;
  if (!real) real = REAL(clock_gettime);
  int failed = real(id, now);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong_by_s();
  return failed;
}

int timespec_get(struct timespec *now, int base) {
  return base == TIME_UTC && !clock_gettime(CLOCK_REALTIME, now) ? base : 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec exact;
  (void)zone;
  if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *now) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (now) *now = exact.tv_sec;
  return exact.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict deadline) {
  static __typeof__(&pthread_cond_timedwait) real;
  struct timespec until = by_the_kernel(deadline);
  if (!real) real = REAL(pthread_cond_timedwait);
  return real(condition, mutex, &until);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict deadline) {
  static __typeof__(&pthread_mutex_timedlock) real;
  struct timespec until = by_the_kernel(deadline);
  if (!real) real = REAL(pthread_mutex_timedlock);
  return real(mutex, &until);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline) {
  static __typeof__(&sem_timedwait) real;
  struct timespec until = by_the_kernel(deadline);
  if (!real) real = REAL(sem_timedwait);
  return real(semaphore, &until);
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t id, const struct timespec *restrict deadline) {
  static __typeof__(&sem_clockwait) real;
  struct timespec until = by_the_kernel(deadline);
  if (!real) real = REAL(sem_clockwait);
  return real(semaphore, id, &until);
}
