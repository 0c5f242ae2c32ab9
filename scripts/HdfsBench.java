import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.URI;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.EnumSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.CreateFlag;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.hadoop.fs.permission.FsPermission;
import org.apache.hadoop.hdfs.DistributedFileSystem;
import org.apache.hadoop.hdfs.protocol.HdfsConstants.DatanodeReportType;
import org.apache.hadoop.io.IOUtils;

/**
 * The Hadoop client against several file systems in turn; prints a table of medians.
 *
 * <p>Usage: java -cp CLIENT_JARS HdfsBench.java ROUNDS CREATES STATS FOLDER LOCAL,LOCAL... NAME=hdfs://HOST:PORT NAME=hdfs://HOST:PORT
 *
 * <p>The ratio is the second system's time by the first one's. The first round is discarded if there are more.
 */
public class HdfsBench {
    static final int DATANODES = 3;
    static final int[] THREADS = {1, 16};

    /** What the Hadoop shell copies at a time. */
    static final int BUFFER_BYTES = 4096;

    /** Row, then system, then seconds of each round. */
    static final Map<String, Map<String, List<Double>>> TIMES = new LinkedHashMap<>();

    /** Seconds that the disk alone took. */
    static final List<Double> DISK = new ArrayList<>();

    /** A file of holes only: reading on in it takes memory and no disk. */
    static FileChannel filler;

    static long fillerAt;

    static final long FILLER_BYTES = 1L << 42, STEP_BYTES = 256L << 20;

    static final Map<String, Long> COUNTS = new LinkedHashMap<>();

    interface Work {
        void run() throws Exception;
    }

    interface Call {
        void run(int at) throws IOException;
    }

    /**
     * What every measurement starts from: nothing left for the disks to do that the one before did not wait for, and memory full of cached pages,
     * as on a machine that has been at work. Of free memory a virtual machine's host may have to be asked for each page.
     */
    static void settle() throws Exception {
        if (new ProcessBuilder("sync").inheritIO().start().waitFor() != 0) throw new IOException("sync failed");
        List<String> before = null;
        for (int seconds = 0; seconds < 60; seconds++) {
            List<String> now = Files.readAllLines(Paths.get("/proc/diskstats"));
            if (now.equals(before)) break;
            before = now;
            Thread.sleep(1_000);
        }
        ByteBuffer buffer = ByteBuffer.allocateDirect(1 << 20);
        for (long last = Long.MAX_VALUE, free; last - (free = freeBytes()) > STEP_BYTES / 2; last = free) {
            for (long end = fillerAt + STEP_BYTES; fillerAt < end; fillerAt += buffer.position()) {
                buffer.clear();
                if (filler.read(buffer, fillerAt) <= 0) throw new IOException("the file that fills memory has ended");
            }
        }
    }

    static long freeBytes() throws IOException {
        for (String line : Files.readAllLines(Paths.get("/proc/meminfo"))) {
            if (line.startsWith("MemFree:")) return Long.parseLong(line.replaceAll("[^0-9]", "")) << 10;
        }
        throw new IOException("/proc/meminfo does not say what is free");
    }

    static void time(String row, String system, long count, Work work) throws Exception {
        settle();
        long begin = System.nanoTime();
        work.run();
        double seconds = (System.nanoTime() - begin) / 1e9;
        TIMES.computeIfAbsent(row, any -> new LinkedHashMap<>()).computeIfAbsent(system, any -> new ArrayList<>()).add(seconds);
        COUNTS.put(row, count);
        System.err.printf("bench: %s, %s: %.2f s%n", system, row, seconds);
    }

    /** Calls with 0..count, from so many threads. */
    static void each(int threads, int count, Call call) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(threads);
        List<Future<?>> parts = new ArrayList<>();
        for (int thread = 0; thread < threads; thread++) {
            int first = thread;
            parts.add(pool.submit(() -> {
                for (int at = first; at < count; at += threads) call.run(at);
                return null;
            }));
        }
        for (Future<?> part : parts) part.get();
        pool.shutdown();
    }

    static void waitForDatanodes(FileSystem fs) throws Exception {
        long end = System.nanoTime() + 120_000_000_000L;
        while (true) {
            try {
                if (((DistributedFileSystem) fs).getDataNodeStats(DatanodeReportType.LIVE).length >= DATANODES) return;
            } catch (IOException notYet) {
                if (System.nanoTime() > end) throw notYet;
            }
            if (System.nanoTime() > end) throw new IOException("there are no " + DATANODES + " datanodes at " + fs.getUri());
            Thread.sleep(200);
        }
    }

    /** Datanodes delete blocks some time after the file is gone: that is not to happen in somebody else's time. */
    static void waitForRoom(String folder, long bytes) throws Exception {
        long end = System.nanoTime() + 120_000_000_000L;
        while (Files.getFileStore(Paths.get(folder)).getUnallocatedSpace() < bytes) {
            if (System.nanoTime() > end) throw new IOException("deleted blocks still take room, or something else fills the disk of " + folder);
            Thread.sleep(200);
        }
    }

    static void files(String system, FileSystem fs, String folder, String[] locals) throws Exception {
        for (String local : locals) {
            String kind = Paths.get(local).getFileName().toString();
            Path path = new Path("/" + kind);
            java.nio.file.Path back = Paths.get(folder, "back");
            long bytes = Files.size(Paths.get(local));
            long room = Files.getFileStore(Paths.get(folder)).getUnallocatedSpace();
            time("put, blocks synced, " + kind, system, -bytes, () -> {
                EnumSet<CreateFlag> flags = EnumSet.of(CreateFlag.CREATE, CreateFlag.OVERWRITE, CreateFlag.SYNC_BLOCK);
                FsPermission mode = FsPermission.getFileDefault();
                try (InputStream in = FileSystem.getLocal(fs.getConf()).open(new Path(local));
                        OutputStream out = fs.create(path, mode, flags, BUFFER_BYTES, fs.getDefaultReplication(path), fs.getDefaultBlockSize(path), null)) {
                    IOUtils.copyBytes(in, out, BUFFER_BYTES);
                }
            });
            fs.delete(path, false);
            waitForRoom(folder, room - bytes / 8);
            time("put, " + kind, system, -bytes, () -> fs.copyFromLocalFile(false, true, new Path("file://" + local), path));
            time("read, " + kind, system, -bytes, () -> {
                byte[] buffer = new byte[1 << 16];
                long got = 0;
                try (InputStream in = fs.open(path)) {
                    for (int n; (n = in.read(buffer)) > 0; ) got += n;
                }
                if (got != bytes) throw new IOException(path + ": " + got + " bytes of " + bytes);
            });
            time("get to a file, " + kind, system, -bytes, () -> {
                try (InputStream in = fs.open(path); OutputStream out = Files.newOutputStream(back)) {
                    byte[] buffer = new byte[1 << 16];
                    for (int n; (n = in.read(buffer)) > 0; ) out.write(buffer, 0, n);
                }
            });
            if (Files.mismatch(Paths.get(local), back) >= 0) throw new IOException(path + " came back differently from " + system);
            Files.delete(back);
            fs.delete(path, false);
            waitForRoom(folder, room - bytes / 8);
        }
    }

    static void names(String system, FileSystem fs, int creates, int stats) throws Exception {
        for (int threads : THREADS) {
            Path folder = new Path("/names-" + threads);
            fs.mkdirs(folder);
            // One thread waits for each answer: fewer calls say as much.
            int some = threads == 1 ? 5 : 1, made = creates / some, asked = stats / some;
            String by = threads == 1 ? "one thread" : threads + " threads";
            time("create and close, " + by, system, made, () -> each(threads, made, at -> fs.create(new Path(folder, "f" + at)).close()));
            time("stat, " + by, system, asked, () -> each(threads, asked, at -> fs.getFileStatus(new Path(folder, "f" + at % made))));
            fs.delete(folder, true);
        }
    }

    /** What the disk takes at best: as many files as there are replicas, written at once from memory and synced. */
    static void disk(String folder, String local) throws Exception {
        settle();
        long begin = System.nanoTime();
        each(DATANODES, DATANODES, at -> {
            ByteBuffer buffer = ByteBuffer.allocateDirect(1 << 20);
            java.nio.file.Path copy = Paths.get(folder, "copy" + at);
            try (FileChannel in = FileChannel.open(Paths.get(local));
                    FileChannel out = FileChannel.open(copy, StandardOpenOption.CREATE_NEW, StandardOpenOption.WRITE)) {
                while (in.read(buffer.clear()) > 0) {
                    for (buffer.flip(); buffer.hasRemaining(); ) out.write(buffer);
                }
                out.force(true);
            }
        });
        DISK.add((System.nanoTime() - begin) / 1e9);
        System.err.printf("bench: the disk alone: %.2f s%n", DISK.get(DISK.size() - 1));
        for (int at = 0; at < DATANODES; at++) Files.delete(Paths.get(folder, "copy" + at));
    }

    static double median(List<Double> all) {
        List<Double> kept = new ArrayList<>(all.size() > 1 ? all.subList(1, all.size()) : all);
        kept.sort(null);
        int middle = kept.size() / 2;
        return kept.size() % 2 == 1 ? kept.get(middle) : (kept.get(middle - 1) + kept.get(middle)) / 2;
    }

    static String cell(String row, double seconds) {
        long count = COUNTS.get(row);
        if (count < 0) return String.format("%.2f s (%.0f MB/s)", seconds, -count / seconds / 1e6);
        return String.format("%.2f s (%,.0f a second)", seconds, count / seconds);
    }

    public static void main(String[] args) throws Exception {
        int rounds = Integer.parseInt(args[0]), creates = Integer.parseInt(args[1]), stats = Integer.parseInt(args[2]);
        Map<String, FileSystem> systems = new LinkedHashMap<>();
        for (int at = 5; at < args.length; at++) {
            String[] pair = args[at].split("=", 2);
            FileSystem fs = FileSystem.newInstance(URI.create(pair[1]), new Configuration());
            waitForDatanodes(fs);
            systems.put(pair[0], fs);
        }
        java.nio.file.Path holes = Paths.get(args[3], "holes");
        filler = FileChannel.open(holes, StandardOpenOption.CREATE, StandardOpenOption.READ, StandardOpenOption.WRITE);
        filler.write(ByteBuffer.allocate(1), FILLER_BYTES);
        for (int round = 1; round <= rounds; round++) {
            System.err.println("bench: round " + round + " of " + rounds);
            for (Map.Entry<String, FileSystem> one : systems.entrySet()) files(one.getKey(), one.getValue(), args[3], args[4].split(","));
            disk(args[3], args[4].split(",")[0]);
            for (Map.Entry<String, FileSystem> one : systems.entrySet()) names(one.getKey(), one.getValue(), creates, stats);
        }
        System.out.println("| what | " + String.join(" | ", systems.keySet()) + " | times as fast |");
        System.out.println("|---" + "|---".repeat(systems.size()) + "|---|");
        TIMES.forEach((row, times) -> {
            StringBuilder line = new StringBuilder("| " + row);
            times.values().forEach(all -> line.append(" | ").append(cell(row, median(all))));
            List<List<Double>> both = new ArrayList<>(times.values());
            System.out.println(line + String.format(" | %.2f |", median(both.get(both.size() - 1)) / median(both.get(0))));
        });
        System.out.printf("%nThe disk alone: %d copies of one of these files, written at once and synced, %.2f s%n", DATANODES, median(DISK));
        System.exit(0);
    }
}
